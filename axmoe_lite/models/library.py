"""torchvision, where it can be imported.

Chapter: 05, "What happens to a network?"
"""

import sys
from types import ModuleType

import torch

_nms_library: torch.library.Library | None = None  # must outlive the import that needs it


def import_torchvision() -> ModuleType:
    """Import torchvision, also where a CPU-only torch meets a torchvision built for CUDA.

    Such a torchvision cannot load its compiled part and then fails because the two operators that
    part would have declared are missing. Declaring them lets everything written in Python work
    (its models, its data sets); box suppression itself stays unavailable.
    """
    global _nms_library
    try:
        import torchvision
    except RuntimeError as reason:
        if "torchvision::nms" not in str(reason):
            raise
        for broken in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[broken]
        _nms_library = torch.library.Library("torchvision", "DEF")
        _nms_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _nms_library.define("qnms(Tensor dets, Tensor scores, float iou_threshold, float score_threshold) -> Tensor")
        import torchvision
    return torchvision
