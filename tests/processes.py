"""Process groups for tests: gloo processes that are started once a session and take many calls."""

import multiprocessing
import pickle
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

PATIENCE = 60  # seconds


def serve(rank, size, meeting, pipe):
    """Runs the functions that come down the pipe, until None comes."""
    torch.set_num_threads(1)
    patience = timedelta(seconds=PATIENCE // 2)
    dist.init_process_group("gloo", f"file://{meeting}", patience, rank=rank, world_size=size)
    while (call := pickle.loads(pipe.recv_bytes())) is not None:
        function, arguments = call
        try:
            answer = function(*arguments), None
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


class World:
    """`size` processes of one gloo group."""

    def __init__(self, size):
        self.size, self.processes = size, []

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        meeting = Path(self.folder.name) / "meeting"
        ends = [context.Pipe() for _ in range(self.size)]
        self.pipes = [ours for ours, _ in ends]
        for rank, (_, theirs) in enumerate(ends):
            process = context.Process(target=serve, args=(rank, self.size, str(meeting), theirs), daemon=True)
            process.start()
            self.processes.append(process)

    def run(self, function, *arguments):
        """[function(*arguments) of every rank]. A function of a module; a failure ends the processes."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        deadline, answers, failures = time.monotonic() + PATIENCE, [], []
        for rank, pipe in enumerate(self.pipes):
            ready = pipe.poll(max(deadline - time.monotonic(), 1))
            answer, failure = pickle.loads(pipe.recv_bytes()) if ready else (None, f"no answer within {PATIENCE} s")
            answers.append(answer)
            failures += [] if failure is None else [f"rank {rank}: {failure}"]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return answers

    def stop(self):
        for process, pipe in zip(self.processes, self.pipes if self.processes else [], strict=True):
            pipe.send_bytes(pickle.dumps(None))
            process.join(timeout=5)
            process.terminate()
        self.processes = []


class Collectives:
    """What this process asks of torch.distributed, by (function, dtype of its input), while the context is open."""

    NAMES = (
        *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single"),
        *("broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter"),
        *("reduce_scatter_tensor", "scatter", "send", "recv", "isend", "irecv", "barrier"),
    )

    def __enter__(self):
        self.calls, self._originals = [], {name: getattr(dist, name) for name in self.NAMES}
        for name, original in self._originals.items():
            setattr(dist, name, self._counting(name, original))
        return self

    def _counting(self, name, original):
        def counted(*arguments, **keywords):
            tensors = [x for x in arguments if torch.is_tensor(x)]
            self.calls.append((name, tensors[-1].dtype if tensors else None))
            return original(*arguments, **keywords)

        return counted

    def __exit__(self, *_):
        for name, original in self._originals.items():
            setattr(dist, name, original)
