"""Rounded layers as pairs of QuantizeLinear and DequantizeLinear, which engines make products of int8 or fp8 of; weights as the bytes of their grid.

Made of what a quantised checkpoint says (`model.rounded`), with nothing of the quantiser: scales are constants, weights are stored in the type they
are on the grid of, with a scale an output channel, or for four bits a scale a block. While the network is traced each rounding is one node of a
domain that exists nowhere else; `expand` puts the standard's nodes in their places, because the tracer cannot write constants of such types.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional

from model.network import MTGR
from model.rounded import INT4_BLOCK, Round, RoundedLinear

DOMAIN, VERSION = "mtgr.tracing", 1

INT4_OPSET, INT4_IR = 21, 10
"""The first whose DequantizeLinear takes four bits and blocks. All operators of ours are the same in it."""

KINDS = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN, "int4": TensorProto.INT4}
LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
"""The value of a number that stands for the end of the range."""
FLOATS = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16}
OFF_GRID = 1e-3
"""How far a weight may lie from its grid, in steps of it, or for E4M3 relative: what float32 loses on the way there and back."""
TENSORS = {dtype: kind for kind, dtype in FLOATS.items()}


def replace(model: MTGR) -> dict[str, Tensor]:
    """Make the roundings of `model`, which is in float32, nodes of `DOMAIN`, for tracing alone. Returns the weights on grids, for `expand`.

    Raises ValueError for a number that is no type of the standard's.
    """
    found: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, Round | RoundedLinear)}
    for name, module in found.items():
        number = (module.round if isinstance(module, RoundedLinear) else module).number
        if number not in ("float", "int8", "fp8"):
            raise ValueError(f"the standard has no {number}, in which {name} is rounded; export a model of an int8, fp8 or int4 recipe")
    # Inner ones last, because a layer is given the rounding that its stand-in keeps.
    for name, module in found.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _Linear(module) if isinstance(module, RoundedLinear) else _Rounds(name, module))
    return {f"{name}.weight": module.weight.detach() for name, module in found.items() if isinstance(module, RoundedLinear)}


class _Rounds(nn.Module):
    """Stands in for Round."""

    pre_scale: Tensor | None

    def __init__(self, name: str, round: Round) -> None:
        super().__init__()
        self.name, self.number, self.largest = name, round.number, round.largest
        self.register_buffer("pre_scale", round.pre_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        if self.pre_scale is not None:
            x = x * self.pre_scale.to(x.dtype)
        return x if self.number == "float" else _Round.apply(x, self.number, self.largest, TENSORS[x.dtype], self.name)


class _Linear(nn.Module):
    """Stands in for RoundedLinear."""

    def __init__(self, layer: RoundedLinear) -> None:
        super().__init__()
        self.weight, self.bias, self.round = layer.weight, layer.bias, layer.round
        self.number = "int4" if layer.round.number == "float" else layer.round.number  # weights alone are rounded in no other

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] -> [n, out]."""
        return functional.linear(self.round(x), _Weight.apply(self.weight, self.number, TENSORS[self.weight.dtype]), self.bias)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, number: str, largest: float, kind: int, name: str) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, number: str, largest: float, kind: int, name: str) -> Any:
        return g.op(f"{DOMAIN}::Round", x, number_s=number, largest_f=largest, kind_i=kind, name_s=name).setType(x.type())


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, number: str, kind: int) -> Tensor:
        return weight.clone()

    @staticmethod
    def symbolic(g: Any, weight: Any, number: str, kind: int) -> Any:
        return g.op(f"{DOMAIN}::Weight", weight, number_s=number, kind_i=kind).setType(weight.type())


def expand(model: onnx.ModelProto, weights: Mapping[str, Tensor]) -> None:
    """Put the standard's nodes where those of `DOMAIN` are, in place. `weights` as `replace` returned them.

    Raises ValueError for a weight that does not lie on its grid.
    """
    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    calls: Counter[str] = Counter()
    for node in graph.node:
        if node.domain == DOMAIN:
            nodes += _of_input(graph, node, calls) if node.op_type == "Round" else _of_weight(graph, node, held[node.input[0]], weights)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    versions = {entry.domain: entry.version for entry in model.opset_import if entry.domain != DOMAIN}
    if any(tensor.data_type == TensorProto.INT4 for tensor in graph.initializer):
        versions[""], model.ir_version = INT4_OPSET, max(model.ir_version, INT4_IR)
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in versions.items())


def _of_input(graph: onnx.GraphProto, node: onnx.NodeProto, calls: Counter[str]) -> list[onnx.NodeProto]:
    """Of what goes into a product: a constant scale for all of it."""
    said = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    number, (out,) = said["number"].decode(), node.output
    scale, zero = f"{out}_scale", f"{out}_zero"
    name = said["name"].decode()
    calls[name] += 1
    graph.initializer.append(helper.make_tensor(scale, said["kind"], [], [said["largest"] / LARGEST[number]]))
    graph.initializer.append(helper.make_tensor(zero, KINDS[number], [], [0]))
    return [
        helper.make_node("QuantizeLinear", [node.input[0], scale, zero], [f"{out}_rounded"], name=f"{name}/QuantizeLinear_{calls[name]}"),
        helper.make_node("DequantizeLinear", [f"{out}_rounded", scale, zero], [out], name=f"{name}/DequantizeLinear_{calls[name]}"),
    ]


def _of_weight(graph: onnx.GraphProto, node: onnx.NodeProto, tensor: onnx.TensorProto, weights: Mapping[str, Tensor]) -> list[onnx.NodeProto]:
    """Of a weight [out, in] that lies on its grid: its bytes, in place of `tensor`, and a scale a row or a block of it."""
    said = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    number, blocks = said["number"].decode(), said["number"] == b"int4"
    if tensor.data_type in FLOATS:  # and not put on its grid already: the tracer makes one tensor of equal ones
        weight = weights[tensor.name]
        groups = weight.view(len(weight), -1, INT4_BLOCK) if blocks else weight[:, None]
        # The largest of a group lies at the end of the range, so that its magnitude gives the grid back.
        scale = groups.abs().amax(dim=2) / LARGEST[number]
        values = (groups / torch.where(scale > 0, scale, 1.0)[:, :, None]).view_as(weight)
        on_grid = values.to(torch.float8_e4m3fn).float() if number == "fp8" else values.round()
        if not bool(((values - on_grid).abs() < OFF_GRID * values.abs().clamp(min=1)).all()):
            raise ValueError(
                f"weights of a rounded layer lie on the grid of {number}, and those of {tensor.name} do not; quantise the checkpoint again"
            )
        tensor.CopyFrom(helper.make_tensor(tensor.name, KINDS[number], tensor.dims, _bytes(on_grid, number), raw=True))
        kept = (scale if blocks else scale[:, 0]).to(FLOATS[said["kind"]]).contiguous()
        content = kept.view(torch.uint8).numpy().tobytes()
        graph.initializer.append(helper.make_tensor(f"{tensor.name}_scale", said["kind"], kept.shape, content, raw=True))
        if not blocks:  # without zeros in so many words ONNX Runtime makes no integer product
            graph.initializer.append(helper.make_tensor(f"{tensor.name}_zero", KINDS[number], kept.shape, bytes(kept.numel()), raw=True))
    axes = {"axis": 1, "block_size": INT4_BLOCK} if blocks else {"axis": 0}
    inputs = [tensor.name, f"{tensor.name}_scale", *(() if blocks else (f"{tensor.name}_zero",))]
    return [helper.make_node("DequantizeLinear", inputs, node.output, name=f"{tensor.name}/DequantizeLinear", **axes)]


def _bytes(values: Tensor, number: str) -> bytes:
    """Of values that are whole numbers, or E4M3's."""
    if number == "fp8":
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()
    whole = values.to(torch.int8)
    if number == "int8":
        return whole.numpy().tobytes()
    low, high = (whole.flatten() & 15).view(torch.uint8).view(-1, 2).unbind(1)
    return (low | high << 4).numpy().tobytes()
