"""An engine that asks a server: requests in flight, tries again, a cap on what is spent. Knows no model and no torch.

Captions are greedy, or sampled where engine.api.temperature is above 0. The protocol has no beam search, so they are
never those of engine.kind=beam. A model that changes at the server under its name goes unnoticed here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from capsfusion_ray.config import ApiConfig, DecodeConfig, EngineConfig
from capsfusion_ray.core.types import FinishReason, Generation, Prompt
from capsfusion_ray.engines.api import openai
from capsfusion_ray.engines.base import Occupancy
from capsfusion_ray.errors import CapsFusionError, ConfigError, CostCapReached, EndpointDown

log = logging.getLogger(__name__)
STEP_S = 0.2  # step() waits so long for a caption before it lets new prompts in
CONNECT_S = 10.0
BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 30.0  # doubled from try to try; up to a half of it is taken off by chance
ROW_TRIES = 8  # a row that fails so often while others are answered is at fault itself
PROBE_FROM = 2  # failures of a row that nobody was answered beside: then it is asked whether the server is there at all
ANSWER_TRIES = 3  # answers that cannot be read are paid for as well
REFUSALS_IN_A_ROW = 50  # then it is not the rows
MAX_ANSWER_BYTES = 4 << 20
WARN_EVERY_S = 30.0
_PASSING = {408, 409, 425, 429}  # and all from 500


class _RowRefused(Exception):
    """The server will not write this row, however often it is asked."""


class _Again(Exception):
    """This try came to nothing; another may not."""

    def __init__(self, why: str, after_s: float | None = None, limited: bool = False) -> None:
        super().__init__(why)
        self.after_s, self.limited = after_s, limited


@dataclass
class _Tries:
    """What one row has been through."""

    waits: int = 0  # tries that came to nothing, whatever the cause
    failures: int = 0  # of these, those that others did not share; a 429 is nobody's fault
    shared: int = 0
    failed_at: float | None = None
    unreadable: int = 0


class ApiEngine:
    """Implements engines.base.Engine. At most `engine.api.concurrency` requests are in flight, further tries included.

    A row is tried again after 408, 409, 425, 429, 5xx, resets, time-outs and unreadable answers. step() raises, once what
    was in flight has come back and has been handed out:
    ConfigError where the server wants another key, URL or model, or refuses row after row;
    EndpointDown where it gave no good answer for engine.api.gone_s;
    CostCapReached where this engine has spent engine.api.max_dollars. It counts every answer that tells its tokens, at the
    full price (a cached prompt may cost less), and cannot count tries without an answer, which a server may bill all the
    same. Nothing is sent after the cap is reached; it is overrun by what is in flight then.
    """

    def __init__(self, engine: EngineConfig, decode: DecodeConfig) -> None:
        check(engine.api, decode)
        self._api = engine.api
        self._key = api_key(engine.api)
        self._max_tokens = decode.max_new_tokens
        self._url = engine.api.url.rstrip("/") + openai.path(engine.api)
        self._unfinished = 0
        self._finished: queue.SimpleQueue[Generation] = queue.SimpleQueue()
        # From here on: written by the thread of the requests, but for one line of submit().
        self._failed: Exception | None = None  # why nothing more is sent
        self._dollars = 0.0
        self._answered: float | None = None  # when the last good answer came
        self._silent_since: float | None = None
        self._not_before = 0.0  # of any request: a Retry-After is meant for the key, not for one row
        self._refusals = 0  # since the last good answer
        self._good: Prompt | None = None  # the last one that was answered
        self._probing = False
        self._warned: float | None = None
        self._prompts: asyncio.Queue[Prompt | None] = asyncio.Queue()
        self._stopping = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="api requests", daemon=True)
        self._thread.start()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[] for _ in texts]

    @property
    def unfinished(self) -> int:
        return self._unfinished

    @property
    def occupancy(self) -> Occupancy:
        return Occupancy(min(self._unfinished, self._api.concurrency), self._api.concurrency)

    @property
    def dollars(self) -> float:
        """Spent since this engine began, as far as the server told."""
        return self._dollars

    def submit(self, prompts: Sequence[Prompt]) -> None:
        if not self._unfinished:
            self._silent_since = None  # nobody was asked in between
        self._unfinished += len(prompts)
        with contextlib.suppress(RuntimeError):  # the loop is closed: step() says why
            for prompt in prompts:
                self._loop.call_soon_threadsafe(self._prompts.put_nowait, prompt)

    def step(self) -> list[Generation]:
        if not self._unfinished:
            return []
        ended = not self._thread.is_alive()
        finished: list[Generation] = []
        with contextlib.suppress(queue.Empty):
            finished.append(self._finished.get(timeout=STEP_S))
            while True:
                finished.append(self._finished.get_nowait())
        self._unfinished -= len(finished)
        if ended and not finished and self._failed is not None:
            raise self._failed
        return finished

    # -------------------------------------------------------------------------------------- the thread of the requests

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as error:  # a bug; without this the rows in flight would be waited for without end
            self._failed = error
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self._api.timeout_s, sock_connect=CONNECT_S)
        connector = aiohttp.TCPConnector(limit=self._api.concurrency)
        # trust_env: the usual proxy variables.
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=True) as session:
            await asyncio.gather(*(self._work(session) for _ in range(self._api.concurrency)))

    async def _work(self, session: aiohttp.ClientSession) -> None:
        """One of `concurrency` workers: a row to its end, then the next one, until the engine stops."""
        while self._failed is None:
            prompt = await self._prompts.get()
            if prompt is not None and (generation := await self._write(session, prompt)) is not None:
                self._finished.put(generation)

    def _stop(self, error: Exception) -> None:
        if self._failed is None:
            self._failed = error
            self._stopping.set()
            for _ in range(self._api.concurrency):  # wakes the workers that wait for a prompt
                self._prompts.put_nowait(None)

    async def _write(self, session: aiohttp.ClientSession, prompt: Prompt) -> Generation | None:
        """One row to its end, or None where the engine stops before it gets there."""
        tries = _Tries()
        while await self._may_send():
            try:
                generation = await self._ask(session, prompt)
            except _RowRefused as refused:
                self._silent_since = None
                return self._refuse(prompt, str(refused))
            except (_Again, openai.Unreadable) as fault:
                why = self._said(str(fault))
                if (verdict := self._verdict(tries, fault)) is not None:
                    return self._refuse(prompt, f"{why}; {verdict}")
                if tries.shared >= PROBE_FROM:
                    await self._probe(session)
                self._note_failure(why)
                await self._sleep(_backoff(tries.waits))
            except CapsFusionError as error:
                self._stop(error)
            else:
                self._answered, self._silent_since, self._refusals, self._good = time.monotonic(), None, 0, prompt
                return generation
        return None

    async def _probe(self, session: aiohttp.ClientSession) -> None:
        """Ask for one token of a row that was answered before. At a unit's end the rows that are left may all be at fault,
        and without an answer to another one nothing would ever speak against them."""
        if self._good is None or self._probing or not await self._may_send():
            return
        self._probing = True
        try:
            await self._ask(session, self._good, max_tokens=1)
        except (_RowRefused, _Again, openai.Unreadable):
            pass
        except CapsFusionError as error:
            self._stop(error)
        else:
            self._answered, self._silent_since = time.monotonic(), None
        finally:
            self._probing = False

    def _verdict(self, tries: _Tries, fault: _Again | openai.Unreadable) -> str | None:
        """Count one more try that came to nothing; why the row is given up, if it is."""
        tries.waits += 1
        if isinstance(fault, openai.Unreadable):
            tries.unreadable += 1
            return f"{tries.unreadable} such answers" if tries.unreadable >= ANSWER_TRIES else None
        if fault.after_s is not None:
            self._not_before = max(self._not_before, time.monotonic() + min(fault.after_s, self._api.gone_s))
        if not fault.limited:
            # Only what others do not share speaks against a row: a server that is down for a minute fails them all.
            before, tries.failed_at = tries.failed_at, time.monotonic()
            shared = before is not None and (self._answered is None or self._answered < before)
            tries.failures += not shared
            tries.shared += shared
        return f"{tries.failures} tries failed while other rows were answered" if tries.failures >= ROW_TRIES else None

    async def _may_send(self) -> bool:
        """Waits for as long as the server has asked to; False once the engine stops."""
        while self._failed is None and (wait := self._not_before - time.monotonic()) > 0:
            await self._sleep(wait + random.uniform(0, BACKOFF_S))
        cap = self._api.max_dollars
        if cap is not None and self._dollars >= cap:
            self._stop(
                CostCapReached(
                    f"engine.api.max_dollars={cap:g}: {self._dollars:.4f} dollars are spent, by the server's token counts; what is "
                    "committed is kept, and the same command with a higher cap goes on"
                )
            )
        return self._failed is None

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    def _note_failure(self, why: str) -> None:
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        if self._warned is None or now - self._warned > WARN_EVERY_S:
            self._warned = now
            log.warning("%s: %s; trying again", self._url, why)
        if now - self._silent_since >= self._api.gone_s:
            self._stop(
                EndpointDown(
                    f"{self._url}: no good answer for engine.api.gone_s={self._api.gone_s:g} seconds, last: {why}; mend the server "
                    "and give the same command again"
                )
            )

    def _refuse(self, prompt: Prompt, why: str) -> Generation:
        self._refusals += 1
        if self._refusals >= REFUSALS_IN_A_ROW:
            self._stop(
                ConfigError(
                    f"{_where(self._api)}: {self._refusals} rows in a row came to nothing, last: {why}; then it is not the rows: check "
                    "the model, engine.api.chat and engine.api.request"
                )
            )
        return Generation(prompt.id, "", FinishReason.ERROR, error=f"{prompt.id}: {why}")

    async def _ask(self, session: aiohttp.ClientSession, prompt: Prompt, max_tokens: int | None = None) -> Generation:
        """One try. Raises _RowRefused, _Again, openai.Unreadable, or ConfigError, for which the engine stops."""
        body = openai.request_body(self._api, prompt.text, max_tokens or self._max_tokens)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            async with session.post(self._url, json=body, headers=headers, allow_redirects=False) as response:
                data = await _read(response)
        except aiohttp.ConnectionTimeoutError:
            raise _Again(f"no connection within {CONNECT_S:g} seconds") from None
        except TimeoutError:
            raise _Again(f"no answer within engine.api.timeout_s={self._api.timeout_s:g} seconds") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Again(f"{type(error).__name__}: {error}") from None
        if response.status != 200:
            raise self._fault(response.status, data, openai.retry_after(response.headers.get("Retry-After")))
        answer = openai.parse(data)
        tokens = openai.usage(answer)
        if tokens is not None:
            self._dollars += self._api.dollars(*tokens)
        generation = openai.generation(prompt, answer, self._api.chat)
        generation = dataclasses.replace(generation, error=self._said(generation.error))
        if tokens is None and self._api.max_dollars is not None:
            raise ConfigError(
                f"{_where(self._api)}: the answers carry no usage, so engine.api.max_dollars={self._api.max_dollars:g} cannot be "
                "kept; take the cap away, or use a server that counts"
            )
        return generation

    def _fault(self, status: int, data: bytes, after_s: float | None) -> Exception:
        """What another status than 200 means."""
        said = f"status {status}: {self._said(data.decode('utf-8', 'replace'))}"
        if status == 402 or (status == 429 and openai.error_code(data) == "insufficient_quota"):
            return ConfigError(
                f"{_where(self._api)}: {said}; pay in, or take another key, then the same command goes on"
            )
        # Where others were answered, a 403 is a firewall's or moderator's word on one prompt, and a 404 an ingress whose
        # servers restart.
        if status == 401 or (status == 403 and self._answered is None):
            key = (
                f"the key in the environment variable {self._api.key_env}"
                if self._api.key_env
                else "engine.api.key_env"
            )
            return ConfigError(f"{_where(self._api)}: {said}; set {key}")
        if 300 <= status < 400 or (status in (404, 405) and self._answered is None):
            return ConfigError(
                f"{_where(self._api)}: {said}; give the URL up to and with /v1, and a model that it lists under /models"
            )
        if status in _PASSING or status in (404, 405) or status >= 500:
            return _Again(said, after_s, limited=status == 429)
        return _RowRefused(said)

    def _said(self, text: str) -> str:
        """What a server said, on one line, short, and without the key, which some echo."""
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.encode("utf-8", "replace").decode().split())[:300]


# ----------------------------------------------------------------------------------------------------- before the start


def check(api: ApiConfig, decode: DecodeConfig) -> None:
    """Raises ConfigError for what can be known to be wrong without asking the server."""
    for name, example in (("url", "https://…/v1"), ("model", "<its name at the server>")):
        if not getattr(api, name):
            raise ConfigError(f"engine.api.{name}: missing; engine.kind=api needs engine.api.{name}={example}")
    decode.refuse_beams("api")
    api_key(api)


def api_key(api: ApiConfig) -> str:
    """The key, from the environment; empty where none is wanted. Raises ConfigError for one that is missing or no header."""
    if not api.key_env:
        return ""
    key = os.environ.get(api.key_env, "").strip()
    if not key:
        raise ConfigError(
            f"engine.api.key_env={api.key_env}: not set in the environment of this process; set it (on a cluster: for every worker), "
            "or give engine.api.key_env= for a server without keys"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"engine.api.key_env={api.key_env}: its value is not one line of ASCII; set it anew")
    return key


def _where(api: ApiConfig) -> str:
    return f"engine.api.url={api.url}, engine.api.model={api.model}"


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body, whole. Raises Unreadable for one that is too long for a caption."""
    data = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise openai.Unreadable(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    return bytes(data)


def _backoff(tries: int) -> float:
    """Seconds before the next try after `tries` that came to nothing."""
    return float(min(BACKOFF_S * 2.0 ** min(tries - 1, 10), LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0))
