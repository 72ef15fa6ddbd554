"""The types every method is made of: a state of weights, maps over it, and the steps that build the maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from makeweight.numerics.flips import Curvature
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme

if TYPE_CHECKING:
    from makeweight.models.spec import ModelSpec

State = dict[str, Tensor]
"""The weights (O, I) of one block by linear name, fp32 until they meet their grid."""

Params = dict[str, Tensor]
"""Every parameter of one block by its own name, weights, norms and biases, fp32."""


class Stage(IntEnum):
    """When a step acts; the order is the order of execution, whatever the user typed."""

    BLOCK = 1
    WEIGHT = 2
    GRID = 3
    ROUND = 4
    LOSS = 5
    FINETUNE = 6


class Inputs(Protocol):
    """What enters the linears of a block over all calibration samples, with the parameters that it has by then."""

    def moment(self, name: str) -> Tensor:
        """Return the mean over tokens of x x^T for the inputs x of a linear, (I, I) fp32."""
        ...

    def square(self, name: str) -> Tensor:
        """Return the mean over tokens of x^2 alone, (I,) fp32."""
        ...


Reads = Literal["", "squares", "products"]
"""What a step is built from of the inputs of linears: nothing, each one's mean square, or products of all pairs."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a step may know when it builds its map: the scheme, dtypes of scales and of the forward, steps to come.

    The model's description is there for steps that need its edges, `inputs` for those that read them.
    """

    scheme: Scheme
    scale_dtype: torch.dtype
    dtype: torch.dtype
    steps: int
    spec: ModelSpec | None = None
    config: Any = None
    inputs: Inputs | None = None


@dataclass(frozen=True)
class Learnables:
    """Parameters that share a learning rate, named by the option that sets it, as in `sde.rate`.

    The optimiser's rate is `rate`, which the user sees and sets, times `unit`, which the map derives from shapes.
    `descent` is AdamW with a rate that falls along a cosine, or the sign of the gradient with one that falls to zero
    in a straight line. `betas` are how slowly AdamW forgets slopes and their squares.
    """

    name: str
    params: tuple[nn.Parameter, ...]
    rate: float
    unit: float = 1.0
    descent: Literal["adam", "sign"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)


class Map(nn.Module, ABC):
    """One differentiable change of a block's weights; owns what it learns, and is the identity before learning."""

    @abstractmethod
    def forward(self, state: State) -> State:
        """Return the changed weights, same names and shapes."""

    def learnables(self) -> Iterator[Learnables]:
        """Yield what the optimiser may move."""
        yield from ()

    def constrain(self) -> None:
        """Pull the learnables back into their allowed set; called without gradient after every optimiser step."""

    def report(self) -> Mapping[str, float]:
        """Return numbers worth keeping once learning has ended."""
        return {}


class BlockMap(Map):
    """A change of all parameters of a block that leaves its function as it is.

    Where it learns it acts on what the weights' own maps give; where it does not, before they are built.
    """

    @abstractmethod
    def forward(self, state: Params) -> Params:
        """Return the changed parameters, same names and shapes."""


class Grid(Map):
    """The last map of a chain: weights to the values a grid can hold, in the forward's dtype."""

    def take_curvature(self, find: Callable[[], Mapping[str, Curvature]]) -> None:
        """Call `find`, before learning, where learning makes use of how the loss bends along the weights."""

    @abstractmethod
    def codes(self, state: State) -> dict[str, QTensor]:
        """Return the integer codes whose dequantization equals `forward(state)` bit for bit."""


class Refinement(nn.Module, ABC):
    """One block that is on its grid, and what may still be learned in it."""

    @abstractmethod
    def forward(self) -> dict[str, Tensor]:
        """Return what the block is run with, by name of a linear or of a parameter, in the forward's dtype."""

    @abstractmethod
    def learnables(self) -> Iterator[Learnables]:
        """Yield what the optimiser may move."""

    def constrain(self) -> None:
        """Pull the learnables back into their allowed set; called without gradient after every optimiser step."""

    @abstractmethod
    def freeze(self) -> dict[str, QTensor]:
        """Return the codes of the linears, which dequantize to what `forward` gives bit for bit."""

    def learned_rest(self) -> Params:
        """Return the other parameters that are learned, as they are stored."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """A method's keyword-only configuration."""

    stage: ClassVar[Stage]
    learns: ClassVar[bool] = True
    """Whether it has anything to learn, step by step."""
    needs_edges: ClassVar[bool] = False
    """Whether it needs to know which outputs of a block feed which inputs."""

    @property
    def reads_inputs(self) -> Reads:
        """What it is built from of the inputs of linears."""
        return ""

    @property
    def weight_bytes(self) -> int:
        """Memory of its learnables with gradients, moments and best state: bytes per weight where it is not small."""
        return 0

    def conflicts(self, others: tuple[Step, ...]) -> str | None:
        """Return why this step cannot stand beside the others, as a clause, or None where it can."""
        return None

    def misfit(self, scheme: Scheme) -> str | None:
        """Return why this step cannot serve a scheme, as a clause, or None where it can."""
        return None


@dataclass(frozen=True, kw_only=True)
class BlockStep(Step):
    """A step that changes a block as a whole, exactly."""

    stage: ClassVar[Stage] = Stage.BLOCK
    needs_edges: ClassVar[bool] = True

    @abstractmethod
    def build(self, params: Params, context: Context) -> BlockMap:
        """Build the map for one block from its parameters."""


@dataclass(frozen=True, kw_only=True)
class MapStep(Step):
    """A step that changes weights."""

    @abstractmethod
    def build(self, state: State, context: Context) -> Map:
        """Build the map for one block from its weights, at the identity."""


@dataclass(frozen=True, kw_only=True)
class GridStep(Step):
    """A step that brings weights to a grid."""

    stage: ClassVar[Stage] = Stage.GRID

    @property
    def by_flips(self) -> bool:
        """Whether learning asks for the curvature of the loss before it begins."""
        return False

    @abstractmethod
    def build(self, state: State, context: Context) -> Grid:
        """Build the grid for one block from the weights that reach it."""


@dataclass(frozen=True, kw_only=True)
class RoundStep(Step):
    """A step that rounds once learning is over, linear by linear, with the inputs that each really gets."""

    stage: ClassVar[Stage] = Stage.ROUND
    learns: ClassVar[bool] = False

    @property
    def reads_inputs(self) -> Reads:  # noqa: D102
        return "products"

    @abstractmethod
    def codes(
        self, name: str, weight_OI: Tensor, hessian_II: Tensor, grid: Grid, context: Context
    ) -> tuple[QTensor, dict[str, float]]:
        """Return the codes of a matrix as the grid receives it, given X^T X of its inputs, and what to report."""


@dataclass(frozen=True, kw_only=True)
class LossStep(Step):
    """A step that says where, and how heavily, a block's error is judged."""

    stage: ClassVar[Stage] = Stage.LOSS
    learns: ClassVar[bool] = False

    @abstractmethod
    def weights(self) -> tuple[float, ...]:
        """Return the weight of the error after the block itself and after each block that follows."""


@dataclass(frozen=True, kw_only=True)
class TargetStep(Step):
    """A step that holds a block's output to one more target: what the original block makes of the same input.

    The inputs are those of the quantized stream; this error weighs `weight` beside those of the loss.
    """

    stage: ClassVar[Stage] = Stage.LOSS
    learns: ClassVar[bool] = False
    weight: float = 1.0


Target = Literal["logits", "text"]


@dataclass(frozen=True, kw_only=True)
class FinetuneStep(Step):
    """A step that learns once all blocks are on their grid, by what the whole network gives.

    `target` is what its predictions are held to: the original's `logits`, or the next token of the `text`. `recompute`
    forgets a block's activations and computes them again in the backward pass: about a fifth more time, for memory that
    hardly grows with depth. The result is the same.
    """

    stage: ClassVar[Stage] = Stage.FINETUNE
    learns: ClassVar[bool] = False
    steps: int = 120
    batch_size: int = 1
    target: Target = "logits"
    recompute: bool = True

    @abstractmethod
    def build(self, codes: Mapping[str, QTensor], rest: Params, context: Context) -> Refinement:
        """Build what is learned in one block from its codes and its other parameters, at the identity."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the zoo: the step it stands for, one line of what it does, and where it comes from."""

    step: Step
    summary: str
    source: str
    stage: Stage = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage", self.step.stage)
