"""One request to an OpenAI-compatible endpoint; its faults in the words of rewriting.py."""

import contextlib
import email.utils
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from trainers.data.rewriting import Answer, Ask, Busy, Declined, Passing, Terms
from trainers.errors import DataError


@contextlib.asynccontextmanager
async def endpoint(url: str, terms: Terms, timeout_s: float) -> AsyncIterator[Ask]:
    """A way to ask the endpoint at `url`; its key is $OPENAI_API_KEY, where it needs one."""
    import openai

    # Retries are ours: they keep the pace of all requests and the idempotency key.
    client = openai.AsyncOpenAI(
        base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=0, timeout=timeout_s
    )

    async def ask(text: str, idempotency: str) -> Answer:
        try:
            said: Any = await client.chat.completions.create(
                model=terms.model,
                messages=[{"role": "user", "content": terms.prompt.replace("{response}", text)}],
                max_tokens=terms.max_tokens,
                extra_headers={"Idempotency-Key": idempotency},
            )
        except openai.RateLimitError as error:
            if error.code == "insufficient_quota":
                raise DataError(f"{url}: the account's quota is used up ({error.message}).") from error
            raise Busy(
                f"{url} answered 429", _retry_after(error.response.headers.get("retry-after"))
            ) from error
        except (openai.BadRequestError, openai.UnprocessableEntityError, openai.ConflictError) as error:
            raise Declined(f"declined: {_line(error)}") from error
        except (
            openai.APIConnectionError,
            openai.InternalServerError,
            openai.APIResponseValidationError,
        ) as error:
            raise Passing(_line(error)) from error
        except openai.APIStatusError as error:
            raise DataError(
                f"{url} answered {error.status_code} ({_line(error)}). Check --endpoint, --model and OPENAI_API_KEY."
            ) from error
        # Broken JSON.
        except ValueError as error:
            raise Passing(f"the answer cannot be read ({_line(error)})") from error
        return _answer(said)

    try:
        yield ask
    finally:
        await client.close()


def _answer(said: Any) -> Answer:
    try:
        choice, usage = said.choices[0], said.usage
        text = choice.message.content
        return Answer(
            text=text or "",
            id=said.id or "",
            cut=choice.finish_reason == "length",
            refused=bool(getattr(choice.message, "refusal", None))
            or choice.finish_reason == "content_filter",
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
        )
    except (AttributeError, IndexError, TypeError) as error:
        raise Passing(f"the answer is no chat completion ({_line(error)})") from error


def _retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number of them, or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
