"""Sends prompts to an OpenAI-compatible server: concurrent requests, retries, and a limit of cost. Knows no torch.

Captions are greedy, or sampled if engine.api.temperature is above 0. The protocol has no beam search, so they are never
those of engine.kind=beam. If the server changes the model behind a name, this engine cannot notice it.
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
STEP_S = 0.2  # step() waits at most so long for a caption
CONNECT_S = 10.0
BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 30.0  # doubles with each try; a random part of up to a half is subtracted
ROW_TRIES = 8  # a row that fails so often while the server answers other rows is given up
PROBE_FROM = 2  # failures of a row, while no other request succeeded, after which the server is probed
ANSWER_TRIES = 3  # a row with so many unreadable answers is given up, because each of them costs money
REFUSALS_IN_A_ROW = 50  # after so many the engine stops: the settings are wrong, not the rows
MAX_ANSWER_BYTES = 4 << 20
WARN_EVERY_S = 30.0
_TRANSIENT = {408, 409, 425, 429}  # statuses to try again after, as are all from 500 on


class _RowRefused(Exception):
    """The server refuses this row. Further tries would not help."""


class _Again(Exception):
    """This try failed, and another may succeed. `limited` says that the server answered with status 429."""

    def __init__(self, why: str, after_s: float | None = None, limited: bool = False) -> None:
        super().__init__(why)
        self.after_s, self.limited = after_s, limited


@dataclass
class _Tries:
    """The failed tries of one row."""

    waits: int = 0  # all failed tries
    failures: int = 0  # failed tries during which other rows were answered; never those with status 429
    shared: int = 0  # failed tries during which no other row was answered
    failed_at: float | None = None  # time.monotonic() of the last failure
    unreadable: int = 0  # unreadable answers


class ApiEngine:
    """Implements engines.base.Engine. At most `engine.api.concurrency` requests are in flight, retries included.

    A row is tried again after status 408, 409, 425, 429 and 5xx, resets, time-outs and unreadable answers. When all
    requests in flight have ended and `step` has returned their captions, it raises

    - ConfigError if the server wants another key, URL or model, or refuses many rows in succession;
    - EndpointDown if the server gave no good answer for engine.api.gone_s seconds;
    - CostCapReached if this engine has spent engine.api.max_dollars. It counts each answer that reports its tokens, at
      the full price (a cached prompt may cost less). It cannot count tries without an answer, which a server may bill
      too. After the limit is reached nothing more is sent, so requests in flight at that moment can exceed it.
    """

    def __init__(self, engine: EngineConfig, decode: DecodeConfig) -> None:
        check(engine.api, decode)
        self._api = engine.api
        self._key = api_key(engine.api)
        self._max_tokens = decode.max_new_tokens
        self._url = engine.api.url.rstrip("/") + openai.path(engine.api)
        self._unfinished = 0
        self._finished: queue.SimpleQueue[Generation] = queue.SimpleQueue()
        # Only the thread of the requests writes the attributes below; `submit` resets _silent_since.
        self._failed: Exception | None = None  # why the engine stopped
        self._dollars = 0.0
        self._answered: float | None = None  # time of the last good answer
        self._silent_since: float | None = None  # time of the first failure since the last good answer
        self._not_before = 0.0  # no request is sent before this time; a Retry-After holds for the key, not for one row
        self._refusals = 0  # refused rows since the last good answer
        self._good: Prompt | None = None  # the last prompt with a good answer
        self._probing = False
        self._warned: float | None = None  # time of the last warning
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
        """What this engine has spent, by the token counts that the server reported."""
        return self._dollars

    def submit(self, prompts: Sequence[Prompt]) -> None:
        if not self._unfinished:
            self._silent_since = None  # no request was sent in between
        self._unfinished += len(prompts)
        with contextlib.suppress(RuntimeError):  # if the loop is closed, step() raises the reason
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
        except Exception as error:  # a bug; without this line step() would wait for the rows in flight for ever
            self._failed = error
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self._api.timeout_s, sock_connect=CONNECT_S)
        connector = aiohttp.TCPConnector(limit=self._api.concurrency)
        # trust_env makes aiohttp use the usual proxy variables.
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=True) as session:
            await asyncio.gather(*(self._work(session) for _ in range(self._api.concurrency)))

    async def _work(self, session: aiohttp.ClientSession) -> None:
        """Run one of `concurrency` workers: take one row after the other until the engine stops."""
        while self._failed is None:
            prompt = await self._prompts.get()
            if prompt is not None and (generation := await self._write(session, prompt)) is not None:
                self._finished.put(generation)

    def _stop(self, error: Exception) -> None:
        if self._failed is None:
            self._failed = error
            self._stopping.set()
            for _ in range(self._api.concurrency):  # wake the workers that wait for a prompt
                self._prompts.put_nowait(None)

    async def _write(self, session: aiohttp.ClientSession, prompt: Prompt) -> Generation | None:
        """Ask for one row until it has a result. Returns None if the engine stops before that."""
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
        """Ask for one token of a row that was answered before, to learn whether the server works.

        At the end of a unit all remaining rows may be faulty. Only a good answer to another row shows that the rows are
        to blame and not the server.
        """
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
        """Count one more failed try. Returns why the row is given up, or None to try it again."""
        tries.waits += 1
        if isinstance(fault, openai.Unreadable):
            tries.unreadable += 1
            return f"{tries.unreadable} such answers" if tries.unreadable >= ANSWER_TRIES else None
        if fault.after_s is not None:
            self._not_before = max(self._not_before, time.monotonic() + min(fault.after_s, self._api.gone_s))
        if not fault.limited:
            # A failure counts against the row only if other rows were answered since its last one. A server that is down
            # fails all rows.
            before, tries.failed_at = tries.failed_at, time.monotonic()
            shared = before is not None and (self._answered is None or self._answered < before)
            tries.failures += not shared
            tries.shared += shared
        return f"{tries.failures} tries failed while other rows were answered" if tries.failures >= ROW_TRIES else None

    async def _may_send(self) -> bool:
        """Wait as long as the server has asked for. Returns False if the engine has stopped."""
        while self._failed is None and (wait := self._not_before - time.monotonic()) > 0:
            await self._sleep(wait + random.uniform(0, BACKOFF_S))
        cap = self._api.max_dollars
        if cap is not None and self._dollars >= cap:
            self._stop(
                CostCapReached(
                    f"engine.api.max_dollars={cap:g}: {self._dollars:.4f} dollars are spent, by the server's token counts; "
                    "committed units are kept; give the same command with a higher limit to resume"
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
                    f"{self._url}: no good answer for engine.api.gone_s={self._api.gone_s:g} seconds, last: {why}; repair the server "
                    "and give the same command again to resume"
                )
            )

    def _refuse(self, prompt: Prompt, why: str) -> Generation:
        self._refusals += 1
        if self._refusals >= REFUSALS_IN_A_ROW:
            self._stop(
                ConfigError(
                    f"{_where(self._api)}: {self._refusals} rows in succession failed, last: {why}; so the settings are probably "
                    "wrong: check the model, engine.api.chat and engine.api.request"
                )
            )
        return Generation(prompt.id, "", FinishReason.ERROR, error=f"{prompt.id}: {why}")

    async def _ask(self, session: aiohttp.ClientSession, prompt: Prompt, max_tokens: int | None = None) -> Generation:
        """Send one request. Raises _RowRefused, _Again, openai.Unreadable, or ConfigError, which stops the engine."""
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
                f"{_where(self._api)}: the answers have no usage (token counts), so engine.api.max_dollars={self._api.max_dollars:g} "
                "cannot be checked; remove that limit, or use a server that reports usage"
            )
        return generation

    def _fault(self, status: int, data: bytes, after_s: float | None) -> Exception:
        """Return the exception for a status other than 200."""
        said = f"status {status}: {self._said(data.decode('utf-8', 'replace'))}"
        if status == 402 or (status == 429 and openai.error_code(data) == "insufficient_quota"):
            return ConfigError(
                f"{_where(self._api)}: {said}; add credit or use another key, and give the same command again to resume"
            )
        # After other rows were answered, a 403 is the refusal of one prompt by a firewall or moderator, and a 404 comes from
        # an ingress whose servers restart.
        if status == 401 or (status == 403 and self._answered is None):
            key = (
                f"the key in the environment variable {self._api.key_env}"
                if self._api.key_env
                else "engine.api.key_env"
            )
            return ConfigError(f"{_where(self._api)}: {said}; set {key}")
        if 300 <= status < 400 or (status in (404, 405) and self._answered is None):
            return ConfigError(
                f"{_where(self._api)}: {said}; give the URL up to and including /v1, and a model that the server lists under /models"
            )
        if status in _TRANSIENT or status in (404, 405) or status >= 500:
            return _Again(said, after_s, limited=status == 429)
        return _RowRefused(said)

    def _said(self, text: str) -> str:
        """Return a message of the server on one line, shortened, and without the key, which some servers repeat."""
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.encode("utf-8", "replace").decode().split())[:300]


# ----------------------------------------------------------------------------------------------------- before the start


def check(api: ApiConfig, decode: DecodeConfig) -> None:
    """Raises ConfigError for settings that are wrong whatever the server answers."""
    for name, example in (("url", "https://…/v1"), ("model", "<its name at the server>")):
        if not getattr(api, name):
            raise ConfigError(f"engine.api.{name}: missing; engine.kind=api needs engine.api.{name}={example}")
    decode.refuse_beams("api")
    api_key(api)


def api_key(api: ApiConfig) -> str:
    """Return the key from the environment, or "" if none is configured. Raises ConfigError for a missing or invalid key."""
    if not api.key_env:
        return ""
    key = os.environ.get(api.key_env, "").strip()
    if not key:
        raise ConfigError(
            f"engine.api.key_env={api.key_env}: this variable is not set in the environment of the process; set it (on a cluster: for all "
            "workers), or give engine.api.key_env= for a server without keys"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"engine.api.key_env={api.key_env}: the value of this variable is not one line of ASCII; correct it"
        )
    return key


def _where(api: ApiConfig) -> str:
    return f"engine.api.url={api.url}, engine.api.model={api.model}"


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Read the whole body. Raises Unreadable if it is too long to be a caption."""
    data = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise openai.Unreadable(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    return bytes(data)


def _backoff(tries: int) -> float:
    """Return the seconds to wait after `tries` failed tries."""
    return float(min(BACKOFF_S * 2.0 ** min(tries - 1, 10), LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0))
