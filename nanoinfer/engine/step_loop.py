"""StepLoop: launch a step, then commit the one before; what becomes of a step that fails."""

import logging
from collections import deque

from nanoinfer.engine.model_runner import ModelRunner, StepHandle
from nanoinfer.engine.rows import Step
from nanoinfer.engine.scheduler import Scheduler
from nanoinfer.engine.sequence import Sequence
from nanoinfer.errors import EngineDead

logger = logging.getLogger("nanoinfer")


class StepLoop:
    """steps_ahead 0: every step is committed before the next one is scheduled; 1: one stays in flight meanwhile."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, steps_ahead: int) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.steps_ahead = steps_ahead
        self.launched: deque[StepHandle] = deque()

    def step(self) -> list[Sequence]:
        """The sequences that finished; those of a step that failed are among them, with reason "error".

        Raises EngineDead where a step failed because the device is lost.
        """
        before = len(self.launched)
        finished = self._launch()
        # A step stays in flight only while another one follows it.
        ahead = self.steps_ahead if len(self.launched) > before else 0
        while len(self.launched) > ahead:
            finished += self._commit()
        return finished

    def _launch(self) -> list[Sequence]:
        step = self.scheduler.schedule()
        assert step or self.launched or not self.scheduler.has_unfinished(), "nothing to run, and no end"
        if step:
            try:
                self.launched.append(self.runner.launch(step))
            except Exception as error:
                return self._fail(step, error)
        return []

    def _commit(self) -> list[Sequence]:
        handle = self.launched.popleft()
        try:
            tokens, told = handle.tokens(), handle.told()
        except Exception as error:
            failed = self._fail(handle.step, error)
            for later in self.launched:
                self.scheduler.roll_back(later.step)
            self.launched.clear()
            return failed
        return self.scheduler.commit(handle.step, tokens, told)

    def _fail(self, step: Step, error: Exception) -> list[Sequence]:
        """End the requests of a step that failed; EngineDead where the device will not run another one.

        The device's table needs no repair: all rows that the step's message named are given up.
        """
        logger.error("a step of %d requests failed: %r", len(step), error, exc_info=error)
        try:
            self.runner.check_device()
        except Exception as lost:
            raise EngineDead(f"the device is lost: {lost!r}") from error
        return self.scheduler.fail(step, f"the step failed: {error!r}")
