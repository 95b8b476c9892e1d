"""What Submitit is told of its jobs. Its own watcher asks sacct alone: a job that Slurm has requeued after a node
failure is over for it for good, one that ends is noticed after minutes, and without accounting it knows nothing.
"""

from __future__ import annotations

import time

from submitit.slurm.slurm import SlurmInfoWatcher

from slurm.queue import job_states


class QueueWatcher(SlurmInfoWatcher):
    """Asks as `slurm.queue` does. A job is over when Slurm answers that it is, or that it knows it no more.

    Args:
        delay_s: seconds between questions at the most; fewer while the last job is young.
    """

    def update(self) -> None:
        """Asks of all jobs that are not over."""
        self._num_calls += 1
        for job, state in job_states(self._registered - self._finished).items():
            if state.answered:
                self._info_dict[job] = {"JobID": job, "State": state.state, "NodeList": state.nodes}
                if not state.live:
                    self._finished.add(job)
        self._last_status_check = time.time()

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether a job is over.

        Args:
            mode: "force" asks now, "standard" if it is time to, "cache" never.
        """
        self.get_info(job_id, mode)
        return job_id in self._finished
