"""What torch.compile leaves alone: approximate layers, whose loops are compiled already.

Imported only where torch.compile meets one, because torch's compiler takes seconds to import. The parts of a network
between them are compiled.

Chapter: 05, "What happens to a network?"
"""

from collections.abc import Callable

import torch

from axmoe_lite.layers import modules

compute: dict[type, Callable] = {kind: torch.compiler.disable(kind.compute) for kind in modules.KINDS.values()}
