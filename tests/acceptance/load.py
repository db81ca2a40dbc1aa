"""Mixed work for a cluster, as many clients would bring it; every choice comes from a seed."""

from random import Random

from tests.acceptance.client import Client, GaveUp
from tests.acceptance.history import Task

_SERVER = "steps"


class Worker:
    """One client after another, each with a piece of work, until it is told to stop."""

    def __init__(self, name: str, client: Client, *, longest_seconds: float) -> None:
        self.stopping = False
        self._name = name
        self._client = client
        self._random: Random = client.random
        self._longest_seconds = longest_seconds
        self._tasks = 0
        self._works = [self._wait, self._poll, self._follow, self._converse, self._queue_up, self._repeat, self._join]
        self._works.append(self._cancel)

    async def work(self) -> None:
        """Work; what was begun is ended."""
        while not self.stopping:
            try:
                await self._random.choice(self._works)()
            except GaveUp:
                continue

    async def _wait(self) -> None:
        await self._client.start_and_wait(_SERVER, self._task(), key=self._key())

    async def _poll(self) -> None:
        shown = await self._client.start(_SERVER, self._task(), mode="async", key=self._key())
        await self._client.until_ended(_SERVER, shown.run_id)

    async def _follow(self) -> None:
        await self._client.start_and_follow(_SERVER, self._task(), key=self._key())

    async def _converse(self) -> None:
        """A run of several turns, each behind the other's end."""
        shown = await self._client.start(_SERVER, self._task(), mode="sync", key=self._key())
        await self._client.resume_and_follow(_SERVER, shown.run_id, self._task(), key=self._key())
        await self._client.resume(_SERVER, shown.run_id, self._task(), mode="sync", key=self._key())

    async def _queue_up(self) -> None:
        """Input to a run that is still busy waits its turn."""
        shown = await self._client.start(_SERVER, self._task(), mode="async", key=self._key())
        for _ in range(2):
            await self._client.resume(_SERVER, shown.run_id, self._task(), mode="async", key=self._key())
        await self._client.until_ended(_SERVER, shown.run_id)

    async def _repeat(self) -> None:
        """A client that did not get, or did not believe, its answer."""
        task, key = self._task(), self._client.new_key()
        await self._client.start(_SERVER, task, mode="async", key=key)
        await self._client.start(_SERVER, task, mode="sync", key=key)
        await self._client.start_and_follow(_SERVER, task, key=key)

    async def _join(self) -> None:
        """A follower who comes later, and one who knows the beginning."""
        shown = await self._client.start(_SERVER, self._task(), mode="async", key=self._key())
        await self._client.follow(_SERVER, shown.run_id)
        await self._client.follow(_SERVER, shown.run_id, after=1)

    async def _cancel(self) -> None:
        task = self._task()
        shown = await self._client.start(_SERVER, task, mode="async", key=self._key())
        if self._random.random() < 0.5:
            await self._client.get(_SERVER, shown.run_id)
        await self._client.cancel(_SERVER, shown.run_id, key=self._key())
        await self._client.get(_SERVER, shown.run_id)

    def _task(self) -> Task:
        self._tasks += 1
        steps = self._random.randint(1, 6)
        return Task(f"{self._name}-{self._tasks}", steps, self._random.random() * self._longest_seconds / steps)

    def _key(self) -> str | None:
        return self._client.new_key() if self._random.random() < 0.8 else None
