"""MLPs, sequences of layers, and the dense block of attention and MLP."""

from typing import Annotated

from modjax.specs.fields import one_of
from modjax.specs.layer import Cost, Costs, Layer, Load, Shape, check_parts, named, spec
from modjax.specs.layers.attention import Attention, Norm, norm_params

GATED = ("geglu", "swiglu")
Activation = Annotated[str, one_of("gelu", "silu", "relu2", *GATED)]


def matrices(activation: str) -> int:
    """Returns the number of weight matrices of an MLP: 3 with a gated activation, else 2."""
    return 3 if activation in GATED else 2


@spec
class MLP(Layer):
    """MLP of two weight matrices, or of three with a gated activation, added to the stream.

    activation: "gelu", "silu" or "relu2"; gated: "geglu" or "swiglu".
    norm: place of the RMSNorm: "before" the sublayer, "after" it, or "both".
    bias: whether to add a bias to each product.
    """

    activation: Activation = "gelu"
    norm: Norm = "before"
    bias: bool = False

    def cost(self, shape: Shape, load: Load) -> Costs:
        d, f, count = shape.d_model, shape.d_ff, matrices(self.activation)
        biases = d + (count - 1) * f if self.bias else 0
        yield Cost("norm", params=norm_params(self.norm, d))
        yield Cost("mlp", 2.0 * load.tokens * count * d * f, count * d * f + biases)


@spec
class Seq(Layer):
    """Layers one after another, as one layer."""

    parts: tuple[Layer, ...]

    def __init__(self, *parts: Layer):
        object.__setattr__(self, "parts", parts)
        check_parts("Seq", parts)

    def cost(self, shape: Shape, load: Load) -> Costs:
        for part in self.parts:
            yield from part.cost(shape, load)

    def __str__(self) -> str:
        match self.parts:
            case (Attention(), MLP(activation=name)) if self == Dense(name):
                return f"Dense({repr(name) if self != Dense() else ''})"
        return super().__str__()


@named
def Dense(activation: str = "gelu") -> Seq:
    """Returns a transformer block: Attention, then MLP."""
    return Seq(Attention(), MLP(activation))


DENSE = Dense()
