"""The whole answer to a request, put together from its events. Knows the public protos only."""

from __future__ import annotations

from dataclasses import dataclass, field

from carousel.v1 import generation_pb2 as pb


@dataclass
class Output:
    """One output of a request. text and token_ids: without the prompt. logprobs: one per token, where they were asked for.
    prompt: its delta, where it was asked for (echo, prompt_logprobs). finished: why it ended."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)
    prompt: pb.Delta | None = None
    finished: pb.Finished | None = None


@dataclass
class Result:
    """A request that has ended. outputs: by output_index, num_outputs of them. summary: counts and times."""

    request_id: str
    outputs: list[Output] = field(default_factory=list)
    summary: pb.Summary | None = None

    @property
    def text(self) -> str:
        """The text of output 0."""
        return self.outputs[0].text if self.outputs else ""

    @property
    def token_ids(self) -> list[int]:
        """The tokens of output 0."""
        return self.outputs[0].token_ids if self.outputs else []


class Collected:
    """Takes the events of one request, in their order."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._outputs: dict[int, Output] = {}
        self._texts: dict[int, list[str]] = {}
        self._summary: pb.Summary | None = None

    def take(self, event: pb.GenerateResponse) -> None:
        match event.WhichOneof("event"):
            case "delta":
                self._take_delta(event.delta)
            case "finished":
                self._output(event.finished.output_index).finished = event.finished
            case "summary":
                self._summary = event.summary

    def _take_delta(self, delta: pb.Delta) -> None:
        output = self._output(delta.output_index)
        if delta.is_prompt:
            output.prompt = delta
            return
        output.token_ids.extend(delta.token_ids)
        output.logprobs.extend(delta.logprobs)
        self._texts[delta.output_index].append(delta.text)

    def _output(self, index: int) -> Output:
        if index not in self._outputs:
            self._outputs[index], self._texts[index] = Output(), []
        return self._outputs[index]

    def result(self) -> Result:
        """Of the events so far."""
        for index, texts in self._texts.items():
            self._outputs[index].text = "".join(texts)
        return Result(self._request_id, [self._outputs[index] for index in sorted(self._outputs)], self._summary)
