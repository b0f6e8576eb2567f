"""ModelInferRequests made short; what a .proto file declares, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto

from carousel.inference import grpc_service_pb2 as kserve
from scheduler.frontend.kserve_request import to_raw

_KINDS: dict[type, str] = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}


def infer_request(
    text: str,
    raw: bool = True,
    *,
    id: str = "",
    model: str = "tiny",
    outputs: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    **inputs: bool | str,
) -> kserve.ModelInferRequest:
    """raw: in raw_input_contents. A parameter None has no value."""
    request = kserve.ModelInferRequest(model_name=model, id=id)
    for name, value in {"text_input": text, **inputs}.items():
        tensor = request.inputs.add(name=name, datatype="BOOL" if isinstance(value, bool) else "BYTES", shape=[1])
        if raw:
            request.raw_input_contents.append(bytes([value]) if isinstance(value, bool) else to_raw(value))
        elif isinstance(value, bool):
            tensor.contents.bool_contents.append(value)
        else:
            tensor.contents.bytes_contents.append(value.encode())
    request.outputs.extend(kserve.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs)
    for name, value in (parameters or {}).items():
        parameter = request.parameters[name]
        if value is not None:
            setattr(parameter, _KINDS[type(value)], value)
    return request


def declarations(file: FileDescriptorProto) -> dict[str, str]:
    """All that the file declares, by name: what each field, enum value and rpc is on the wire."""
    found: dict[str, str] = {}
    for enum in file.enum_type:
        found |= {f"{enum.name}.{value.name}": str(value.number) for value in enum.value}
    for message in file.message_type:
        found |= _fields(message, message.name)
    for service in file.service:
        for rpc in service.method:
            kinds = ("stream " * rpc.client_streaming, "stream " * rpc.server_streaming)
            found[f"{service.name}.{rpc.name}"] = f"{kinds[0]}{rpc.input_type} → {kinds[1]}{rpc.output_type}"
    return found


def _fields(message: DescriptorProto, path: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for field in message.field:
        label, kind = field.Label.Name(field.label), field.Type.Name(field.type)
        oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
        found[f"{path}.{field.name}"] = " ".join(filter(None, (str(field.number), label, kind, field.type_name, oneof)))
    for nested in message.nested_type:
        found |= _fields(nested, f"{path}.{nested.name}")
    return found
