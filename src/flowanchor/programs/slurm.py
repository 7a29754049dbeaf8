"""SLURM's notice that a job's time is over: the job goes back into the queue, and then on from its last checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess

INTERACTIVE = ("bash", "interactive")  # names of jobs that nobody can put back into the queue


def notices() -> list[int]:
    """The signals by which this process, a task of a SLURM job, is told that its time is over.

    `#SBATCH --signal=SIGUSR1@SECONDS`; jobs that hydra's submitit launcher has submitted get SIGUSR2, or what
    SUBMITIT_PREEMPT_SIGNAL says.
    """
    if os.name == "nt" or job() is None:
        return []
    names = ["USR1"]
    if "SUBMITIT_EXECUTOR" in os.environ:
        names.append(os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))
    return [getattr(signal, f"SIG{name}") for name in dict.fromkeys(names) if hasattr(signal, f"SIG{name}")]


def job() -> str | None:
    """The job's number, as `scontrol requeue` takes it; None outside of a job that can be requeued."""
    number = os.environ.get("SLURM_JOB_ID")
    if number is None or "SLURM_NTASKS" not in os.environ or os.environ.get("SLURM_JOB_NAME") in INTERACTIVE:
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return number if array is None else f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"


def requeue() -> str:
    """Put the job back into the queue, once, by its first task; returns what became of it, as the end of a sentence."""
    number = job()
    assert number is not None
    if os.environ.get("SLURM_PROCID", "0") == "0":
        try:
            done = subprocess.run(["scontrol", "requeue", number], capture_output=True, text=True, timeout=60)
            failure = "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            failure = str(error)
        if failure:
            return f"but scontrol could not requeue job {number} ({' '.join(failure.split())}): submit it again"
    return f"and SLURM starts job {number} again"
