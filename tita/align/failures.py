"""What an exception of the engine means: for the request, for its batch, and for the device."""

import traceback
from dataclasses import dataclass

import torch

from tita.errors import OutOfDeviceMemory, StepFailed, TitaError, is_out_of_memory


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a step failed, without the exception, whose traceback would hold the step's tensors."""

    error: TitaError
    """For the request, if it is to blame."""
    out_of_memory: bool
    details: str
    """The traceback, for the log."""


def examine(error: Exception) -> Failure:
    """What a step's exception means.

    Raises:
        AcceleratorError: the device is lost; every later operation on it fails, too.
    """
    details = "".join(traceback.format_exception(error))
    if is_out_of_memory(error):
        lack = OutOfDeviceMemory(
            "memory ran out for this request alone", remedy="shorten it or give smaller images"
        )
        return Failure(lack, True, details)
    if isinstance(error, torch.AcceleratorError):
        raise error
    if isinstance(error, TitaError):
        return Failure(error, False, details)
    reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
    return Failure(
        StepFailed(f"the engine failed on this request ({type(error).__name__}: {reason})"),
        False,
        details,
    )
