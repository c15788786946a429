"""Rounded layers as pairs of QuantizeLinear and DequantizeLinear, which engines make products of int8 or fp8 of; weights as the bytes of their grid.

Made of what a quantised checkpoint says (`model.rounded`), with nothing of the quantiser: scales are constants, weights are stored in the type they
are on the grid of, with a scale an output channel, or for four bits a scale a block. While the network is traced each rounding is one node of a
domain that exists nowhere else; `expand` puts the standard's nodes in their places, because the tracer cannot write constants of such types.
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional

from model.network import MTGR
from model.rounded import Round, RoundedLinear

DOMAIN, VERSION = "mtgr.tracing", 1

INT4_OPSET, INT4_IR = 21, 10
"""The first whose DequantizeLinear takes four bits and blocks. All operators of ours are the same in it."""

KINDS = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN, "int4": TensorProto.INT4}
LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
"""The value of a number that stands for the end of the range."""
FLOATS = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16}
TENSORS = {dtype: kind for kind, dtype in FLOATS.items()}


def replace(model: MTGR, block: int) -> bool:
    """Make the roundings of `model` nodes of `DOMAIN`, for tracing alone. `block` weights share a scale in four bits; 0 without such layers.

    Returns whether there are any roundings. Raises ValueError for a number that is no type of the standard's.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Round | RoundedLinear)]
    for name, module in found:
        number = module.number if isinstance(module, Round) else module.round.number
        if number not in ("float", "int8", "fp8"):
            raise ValueError(f"the standard has no {number}, in which {name} is rounded; export a model of an int8, fp8 or int4 recipe")
    for name, module in found:
        parent, _, last = name.rpartition(".")
        if isinstance(module, RoundedLinear):
            setattr(model.get_submodule(parent), last, _Linear(module, block))
    for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, Round)]:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _Rounds(module))
    return bool(found)


class _Rounds(nn.Module):
    """Stands in for Round."""

    pre_scale: Tensor | None

    def __init__(self, round: Round) -> None:
        super().__init__()
        self.number, self.largest = round.number, round.largest
        self.register_buffer("pre_scale", round.pre_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        if self.pre_scale is not None:
            x = x * self.pre_scale.to(x.dtype)
        return x if self.number == "float" else _Round.apply(x, self.number, self.largest, TENSORS[x.dtype])


class _Linear(nn.Module):
    """Stands in for RoundedLinear."""

    def __init__(self, layer: RoundedLinear, block: int) -> None:
        super().__init__()
        self.weight, self.bias, self.round = layer.weight, layer.bias, layer.round
        self.number, self.block = ("int4", block) if layer.round.number == "float" else (layer.round.number, 0)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] -> [n, out]."""
        return functional.linear(self.round(x), _Weight.apply(self.weight, self.number, self.block, TENSORS[self.weight.dtype]), self.bias)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, number: str, largest: float, kind: int) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, number: str, largest: float, kind: int) -> Any:
        return g.op(f"{DOMAIN}::Round", x, number_s=number, largest_f=largest, kind_i=kind).setType(x.type())


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, number: str, block: int, kind: int) -> Tensor:
        return weight.clone()

    @staticmethod
    def symbolic(g: Any, weight: Any, number: str, block: int, kind: int) -> Any:
        return g.op(f"{DOMAIN}::Weight", weight, number_s=number, block_i=block, kind_i=kind).setType(weight.type())


def expand(model: onnx.ModelProto) -> None:
    """Put the standard's nodes where those of `DOMAIN` are, in place."""
    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.domain == DOMAIN:
            nodes += _of_input(graph, node) if node.op_type == "Round" else _of_weight(graph, node, held[node.input[0]])
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    versions = {entry.domain: entry.version for entry in model.opset_import if entry.domain != DOMAIN}
    if any(tensor.data_type == TensorProto.INT4 for tensor in graph.initializer):
        versions[""], model.ir_version = INT4_OPSET, max(model.ir_version, INT4_IR)
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in versions.items())


def _of_input(graph: onnx.GraphProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Of what goes into a product: a constant scale for all of it."""
    said = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    number, (out,) = said["number"].decode(), node.output
    scale, zero = f"{out}_scale", f"{out}_zero"
    graph.initializer.append(helper.make_tensor(scale, said["kind"], [], [said["largest"] / LARGEST[number]]))
    graph.initializer.append(helper.make_tensor(zero, KINDS[number], [], [0]))
    return [
        helper.make_node("QuantizeLinear", [node.input[0], scale, zero], [f"{out}_rounded"], name=_name(node, "QuantizeLinear")),
        helper.make_node("DequantizeLinear", [f"{out}_rounded", scale, zero], [out], name=_name(node, "DequantizeLinear")),
    ]


def _of_weight(graph: onnx.GraphProto, node: onnx.NodeProto, tensor: onnx.TensorProto) -> list[onnx.NodeProto]:
    """Of a weight [out, in] that lies on its grid: its bytes, in place of `tensor`, and a scale a row or a block of it."""
    said = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    number, block = said["number"].decode(), said["block"]
    weight = torch.frombuffer(bytearray(tensor.raw_data), dtype=FLOATS[tensor.data_type]).view(*tensor.dims).float()
    groups = weight.view(len(weight), -1, block) if block else weight[:, None]
    # The largest of a group lies at the end of the range, so that its magnitude gives the grid back.
    scale = groups.abs().amax(dim=2) / LARGEST[number]
    values = (groups / torch.where(scale > 0, scale, 1.0)[:, :, None]).view_as(weight)
    scales = scale if block else scale[:, 0]
    tensor.CopyFrom(helper.make_tensor(tensor.name, KINDS[number], tensor.dims, _bytes(values, number), raw=True))
    held = scales.to(FLOATS[said["kind"]]).contiguous()
    graph.initializer.append(helper.make_tensor(f"{tensor.name}_scale", said["kind"], held.shape, held.view(torch.uint8).numpy().tobytes(), raw=True))
    blocks = {"block_size": block} if block else {}
    inputs = [tensor.name, f"{tensor.name}_scale"]
    return [helper.make_node("DequantizeLinear", inputs, node.output, name=_name(node, "DequantizeLinear"), axis=1 if block else 0, **blocks)]


def _bytes(values: Tensor, number: str) -> bytes:
    """Of values that are whole numbers, or E4M3's, but for what float32 has lost."""
    if number == "fp8":
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()
    whole = values.round().to(torch.int8)
    if number == "int8":
        return whole.numpy().tobytes()
    low, high = (whole.flatten() & 15).view(torch.uint8).view(-1, 2).unbind(1)
    return (low | high << 4).numpy().tobytes()


def _name(node: onnx.NodeProto, kind: str) -> str:
    """Of a node that takes the place of a traced one: in the same scope, and told apart from others there."""
    scope, _, last = node.name.rpartition("/")
    return f"{scope}/{last.replace(node.op_type, kind)}"
