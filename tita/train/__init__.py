"""The job `train-dpo`: DPO of the reward model with TRL under DeepSpeed (arXiv 2305.18290)."""
