"""inference.GRPCInferenceService: KServe v2 with Triton's streaming, for clients that speak it, as tritonclient.

Translates, and serves nothing itself: requests go through carousel.v1.Generation, with something in place of the call's context
that makes tensors of the events. So they are checked, counted, refused and ended as all others.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from carousel.inference import grpc_service_pb2 as kserve
from carousel.inference.grpc_service_pb2_grpc import GRPCInferenceServiceServicer
from carousel.v1 import generation_pb2 as pb
from scheduler.errors import InvalidFieldError, NotFoundError, RequestError, UnavailableError
from scheduler.frontend.core_link import CoreLink
from scheduler.frontend.kserve_request import DATATYPES, INPUTS, STREAM, TEXT_INPUT, TEXT_OUTPUT, Asked, to_raw, translate
from scheduler.frontend.server.generation import Generation, worker_facts
from scheduler.frontend.server.status import Context, answers_with_status

NAME = "carousel"  # of server, platform and backend
VERSION = "1"  # of the model
_EXTENSIONS = ("model_configuration", "parameters", "schedule_policy")
_FINAL = "triton_final_response"
_TYPES = {"BYTES": kserve.TYPE_STRING, "BOOL": kserve.TYPE_BOOL}


class Inference(GRPCInferenceServiceServicer):
    def __init__(self, link: CoreLink, generation: Generation, served_model_name: str) -> None:
        self._link, self._generation, self._model = link, generation, served_model_name

    # ----------------------------------------------------------------------------------------------------------- facts

    @answers_with_status
    async def ServerLive(self, request: kserve.ServerLiveRequest, context: Context) -> kserve.ServerLiveResponse:
        return kserve.ServerLiveResponse(live=True)

    @answers_with_status
    async def ServerReady(self, request: kserve.ServerReadyRequest, context: Context) -> kserve.ServerReadyResponse:
        return kserve.ServerReadyResponse(ready=not self._hindrance())

    @answers_with_status
    async def ModelReady(self, request: kserve.ModelReadyRequest, context: Context) -> kserve.ModelReadyResponse:
        is_ours = self._is_ours(request.name, request.version)
        return kserve.ModelReadyResponse(ready=is_ours and not self._hindrance())

    @answers_with_status
    async def ServerMetadata(self, request: kserve.ServerMetadataRequest, context: Context) -> kserve.ServerMetadataResponse:
        if self._link.facts is None:
            raise UnavailableError("the scheduler core is not connected")
        return kserve.ServerMetadataResponse(name=NAME, version=self._link.facts.version, extensions=_EXTENSIONS)

    @answers_with_status
    async def ModelMetadata(self, request: kserve.ModelMetadataRequest, context: Context) -> kserve.ModelMetadataResponse:
        self._check_model(request.name, request.version)
        tensor = kserve.ModelMetadataResponse.TensorMetadata
        return kserve.ModelMetadataResponse(
            name=self._model,
            versions=[VERSION],
            platform=NAME,
            inputs=[tensor(name=name, datatype=DATATYPES[name], shape=[1]) for name in INPUTS],
            outputs=[tensor(name=TEXT_OUTPUT, datatype=DATATYPES[TEXT_OUTPUT], shape=[1])],
        )

    @answers_with_status
    async def ModelConfig(self, request: kserve.ModelConfigRequest, context: Context) -> kserve.ModelConfigResponse:
        self._check_model(request.name, request.version)
        config = kserve.ModelConfig(
            name=self._model,
            platform=NAME,
            backend=NAME,
            input=[
                kserve.ModelInput(name=name, data_type=_TYPES[DATATYPES[name]], dims=[1], optional=name != TEXT_INPUT)
                for name in INPUTS
            ],
            output=[kserve.ModelOutput(name=TEXT_OUTPUT, data_type=_TYPES[DATATYPES[TEXT_OUTPUT]], dims=[1])],
            model_transaction_policy=kserve.ModelTransactionPolicy(decoupled=True),
        )
        return kserve.ModelConfigResponse(config=config)

    @answers_with_status
    async def RepositoryIndex(self, request: kserve.RepositoryIndexRequest, context: Context) -> kserve.RepositoryIndexResponse:
        hindrance = self._hindrance()
        state = "UNAVAILABLE" if hindrance else "READY"
        index = kserve.RepositoryIndexResponse.ModelIndex(name=self._model, version=VERSION, state=state, reason=hindrance)
        return kserve.RepositoryIndexResponse(models=[] if request.ready and hindrance else [index])

    def _hindrance(self) -> str:
        """Why no request is taken; empty: they are."""
        try:
            worker_facts(self._link.facts)
        except UnavailableError as error:
            return error.message
        return ""

    def _is_ours(self, name: str, version: str) -> bool:
        return name == self._model and version in ("", VERSION)

    def _check_model(self, name: str, version: str) -> None:
        if not self._is_ours(name, version):
            raise NotFoundError(f"this server has only model {self._model!r}, version {VERSION}")

    # ------------------------------------------------------------------------------------------------------- inference

    @answers_with_status
    async def ModelInfer(self, request: kserve.ModelInferRequest, context: Context) -> kserve.ModelInferResponse:
        asked = self._translate(request)
        if asked.stream:
            raise InvalidFieldError(f"inputs.{STREAM}", "must be false: ModelInfer has one response, ModelStreamInfer many")
        whole = _Whole(context)
        await self._generation.Generate(asked.request, whole)
        return _response(self._model, asked.id, "".join(whole.text))

    @answers_with_status
    async def ModelStreamInfer(  # type: ignore[override]
        self, request: AsyncIterator[kserve.ModelInferRequest], context: Context
    ) -> None:
        many = _Many(self._model, self._translate, context)
        await self._generation.GenerateMany(many.commands(request), many)

    def _translate(self, request: kserve.ModelInferRequest) -> Asked:
        """Raises RequestError."""
        self._check_model(request.model_name, request.model_version)
        return translate(request)


class _InPlaceOfContext:
    """All of a call's context but what is written."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class _Whole(_InPlaceOfContext):
    """Takes the events of Generate, keeps their text."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.text: list[str] = []

    async def write(self, event: pb.GenerateResponse) -> None:
        self.text.append(event.delta.text)


class _Many(_InPlaceOfContext):
    """Hands GenerateMany the requests, and writes what it writes as responses."""

    def __init__(self, model: str, translate: Callable[[kserve.ModelInferRequest], Asked], context: Context) -> None:
        """translate: raises RequestError."""
        super().__init__(context)
        self._model, self._translate = model, translate
        self._alive: dict[str, _Answer] = {}  # by the id that GenerateMany knows
        self._writing = asyncio.Lock()  # two write: who reads the requests refuses some

    async def commands(self, requests: AsyncIterator[kserve.ModelInferRequest]) -> AsyncIterator[pb.GenerateManyRequest]:
        async for request in requests:
            try:
                asked = self._translate(request)
            except RequestError as error:
                await self._send(_failure(self._model, request.id, error.message))
                continue
            asked.request.request_id = str(uuid.uuid4())
            self._alive[asked.request.request_id] = _Answer(self._model, asked)
            yield pb.GenerateManyRequest(submit=pb.Submit(request=asked.request))

    async def write(self, response: pb.GenerateManyResponse) -> None:
        changed: dict[str, _Answer] = {}
        for event in response.events:
            answer = changed[event.request_id] = self._alive[event.request_id]
            answer.take(event)
        for request_id, answer in changed.items():
            for message in answer.responses():
                await self._send(message)
            if answer.is_over:
                del self._alive[request_id]

    async def _send(self, message: kserve.ModelStreamInferResponse) -> None:
        async with self._writing:
            await self._context.write(message)


class _Answer:
    """A request's events on their way to responses."""

    def __init__(self, model: str, asked: Asked) -> None:
        self._model, self._asked = model, asked
        self._text: list[str] = []
        self._failure = ""
        self.is_over = False

    def take(self, event: pb.RequestEvent) -> None:
        match event.WhichOneof("event"):
            case "delta":
                self._text.append(event.delta.text)
            case "summary":
                self.is_over = True
            case "failed":
                self.is_over, self._failure = True, event.failed.message

    def responses(self) -> Iterator[kserve.ModelStreamInferResponse]:
        """Those that are due. A whole text that failed is none."""
        is_well = self.is_over and not self._failure
        is_last = is_well and not self._asked.empty_final
        if is_last or (is_well and not self._asked.stream) or (self._asked.stream and any(self._text)):
            text, self._text = "".join(self._text), []
            yield kserve.ModelStreamInferResponse(infer_response=_response(self._model, self._asked.id, text, is_last))
        if is_well and not is_last:
            yield kserve.ModelStreamInferResponse(infer_response=_response(self._model, self._asked.id, None, True))
        if self._failure:
            yield _failure(self._model, self._asked.id, self._failure)


def _failure(model: str, request_id: str, message: str) -> kserve.ModelStreamInferResponse:
    return kserve.ModelStreamInferResponse(error_message=message, infer_response=_response(model, request_id, None, True))


def _response(model: str, request_id: str, text: str | None, is_final: bool | None = None) -> kserve.ModelInferResponse:
    """text None: no output."""
    response = kserve.ModelInferResponse(model_name=model, model_version=VERSION, id=request_id)
    if is_final is not None:
        response.parameters[_FINAL].bool_param = is_final
    if text is not None:
        response.outputs.add(name=TEXT_OUTPUT, datatype=DATATYPES[TEXT_OUTPUT], shape=[1])
        response.raw_output_contents.append(to_raw(text))
    return response
