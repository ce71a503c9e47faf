"""What clients may send, field by field, as OpenAI names them. FastAPI checks it and writes /openapi.json from it.

A field that OpenAI does not know is refused, as it refuses it. Fields that change nothing here (who asks, where it is stored) are
accepted and not read. Fields that would change the answer in a way this server cannot are refused where they ask for it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

MAX_MESSAGES = 256
Text = Annotated[str, Field(max_length=30_000_000)]  # a picture as base64 is text; its own limit is in bytes
Number = Annotated[float, Field(allow_inf_nan=False)]
Unread = Annotated[Any, Field(description="Accepted, without an effect.")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Loose(BaseModel):
    """Parts of an answer come back in the next request with all their fields: further ones are not read."""

    model_config = ConfigDict(extra="ignore", strict=True)


# ---- messages


class TextPart(Loose):
    type: Literal["text", "input_text", "output_text"]
    text: Text


class ImageUrl(Loose):
    url: Text = Field(
        description="A data URI or base64; http(s) for hosts of --allow-host, file:// below --media-path."
    )
    detail: Literal["auto", "low", "high", "original"] | None = "auto"


class ImagePart(Loose):
    type: Literal["image_url", "input_image"]
    image_url: ImageUrl | Text

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class OtherPart(Loose):
    type: str = Field(max_length=100)

    @field_validator("type")
    @classmethod
    def refuse(cls, value: str) -> str:
        raise ValueError(f"this server reads text and pictures, not {value!r}")


def kind_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return {
        "text": "text",
        "input_text": "text",
        "output_text": "text",
        "image_url": "image",
        "input_image": "image",
    }.get(kind if isinstance(kind, str) else "", "other")


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[ImagePart, Tag("image")] | Annotated[OtherPart, Tag("other")],
    Discriminator(kind_of_part),
]


class Message(Loose):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=64)]


# ---- how to answer


class Sampled(Strict):
    """How the tokens of an answer are chosen."""

    model: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="One of /v1/models; default the first."
    )
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = Field(None, description="0, the default, is greedy.")
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    stream: bool | None = False
    # of OpenAI, without an effect here
    user: Unread = None
    metadata: Unread = None
    store: Unread = None
    service_tier: Unread = None
    safety_identifier: Unread = None
    prompt_cache_key: Unread = None
    prompt_cache_retention: Unread = None
    parallel_tool_calls: Unread = None
    tool_choice: Unread = None
    # of OpenAI, refused where they ask for something
    tools: list[Any] | None = None

    @field_validator("tools")
    @classmethod
    def no_tools(cls, value):
        if value:
            raise ValueError("these models call no tools: leave it out")
        return value


class StreamOptions(Strict):
    include_usage: bool | None = False
    include_obfuscation: bool | None = False


class JsonSchema(Loose):
    name: Annotated[str, Field(max_length=64)] = "answer"
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class EmbeddingsRequest(Strict):
    """Pictures, each as a data URI, base64, a URL or an image part of a message."""

    model: Annotated[str, Field(max_length=200)] | None = None
    input: Text | ImagePart | Annotated[list[Text | ImagePart], Field(min_length=1, max_length=64)]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = None
    user: Unread = None

    @field_validator("dimensions")
    @classmethod
    def no_dimensions(cls, value):
        if value is not None:
            raise ValueError("vectors are not shortened: leave it out")
        return value


class DetectRequest(Strict):
    image: Text = Field(description="A data URI or base64.")
    conf: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        0.25, description="Objects with a lower score are left out."
    )


class SimulatorRequest(Strict):
    task: Annotated[str, Field(max_length=60)]
    instruction: Annotated[str, Field(min_length=1, max_length=500)] | None = Field(
        None, description="Default: the task's."
    )
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(0, description="Of the layout.")


class AttentionRequest(Strict):
    """Messages as in a chat, and the answer to them."""

    model: Annotated[str, Field(max_length=200)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    answer: Annotated[str, Field(min_length=1, max_length=10_000)]


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    n: Annotated[int, Field(ge=1, le=16)] | None = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = Field(
        None, description="The same seed gives the same answer."
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    # as llama-server and vLLM have them
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=10)] | None = None
    # of OpenAI
    frequency_penalty: Number | None = 0.0
    presence_penalty: Number | None = 0.0
    logit_bias: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Unread = None
    verbosity: Unread = None

    @field_validator("frequency_penalty", "presence_penalty")
    @classmethod
    def no_penalty(cls, value):
        if value:
            raise ValueError("only 0 is supported; repetition_penalty is")
        return value

    @field_validator("logit_bias")
    @classmethod
    def no_bias(cls, value):
        if value:
            raise ValueError("it is not supported: leave it out")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def with_logprobs(cls, value, info):
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("it needs logprobs: true")
        return value


# ---- /v1/responses


class ResponseMessage(Message):
    type: Literal["message"] | None = "message"


class ResponseJsonSchema(Loose):
    type: Literal["json_schema"]
    name: Annotated[str, Field(max_length=64)] = "answer"
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseText(Loose):
    format: Annotated[TextFormat | JsonObjectFormat | ResponseJsonSchema, Field(discriminator="type")] | None = None


class ResponsesRequest(Sampled):
    """No conversation is stored: each request carries its whole input."""

    input: Text | Annotated[list[ResponseMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: ResponseText | None = None
    previous_response_id: Any = None
    conversation: Any = None
    background: bool | None = False
    stream_options: StreamOptions | None = None
    # without an effect here
    reasoning: Unread = None
    truncation: Unread = None
    include: Unread = None
    top_logprobs: Unread = None
    max_tool_calls: Unread = None

    @field_validator("previous_response_id", "conversation", "background")
    @classmethod
    def nothing_stored(cls, value):
        if value:
            raise ValueError("this server stores no responses: send the whole input")
        return value
