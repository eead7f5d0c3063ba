"""The loss terms that depend on the image: mDPO's conditional preference and anchor.

DPO compares two answers under one image, and can learn which answer is better from the texts alone
("unconditional preference"). mDPO (Wang et al., arXiv 2406.11839) adds two terms. With policy pi,
reference r, question q, image m, its negative image m', chosen answer y, and

    h(m, y) = log pi(y | m, q) - log r(y | m, q)

they are, with sigma the logistic function (sections 3.2 and 3.3; L_CoPO, and L_AncPO with delta 0):

    image term   -log sigma(beta h(m, y) - beta h(m', y))
    anchor       -log sigma(beta h(m, y) - delta)

The image term is 0.693 for a model that ignores its image; the anchor keeps the chosen answer from
becoming less likely, which neither DPO nor the image term prevents.
"""

import torch
from torch.nn.functional import logsigmoid

from tita.recipes import ImagePreferenceRecipe


def image_loss(
    own: torch.Tensor,
    other: torch.Tensor | None,
    *,
    preference: ImagePreferenceRecipe,
    beta: float,
) -> torch.Tensor:
    """The weighted sum of both terms, a scalar.

    Args:
        own: h(m, y) of each chosen answer under its image, `[B]`.
        other: h(m', y) of the same answers under their negative images, `[B]`; None if the weight
            of the image term is 0.
        preference: the weights.
        beta: DPO's.
    """
    loss = -preference.anchor * logsigmoid(beta * own).mean()
    if other is not None:
        loss = loss - preference.weight * logsigmoid(beta * (own - other)).mean()
    return loss
