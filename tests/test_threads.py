"""Many calls at once, on one model and on many: the answers of one thread, and every switch of torch as it was.

The calls run in an interpreter of their own, which this file is run by: where torch is not used right, it ends without an
exception.
"""

import random
import sys
import threading
import warnings

import torch
from torch import nn

import fastsal
from fastsal.model import traced

THREADS = 8


class Attention(nn.Module):
    """Tokens through torch's own encoder layer, whose fast path has no derivatives in forward mode."""

    def __init__(self):
        super().__init__()
        self.into = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.out = nn.Linear(24, 80)

    def forward(self, x):
        return self.out(self.into(x.unflatten(1, (3, 8))).flatten(1))


class Recurrent(nn.Module):
    """No forward mode at all: products are the derivative of a backward pass."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 80)

    def forward(self, x):
        return self.out(self.into(x.unflatten(1, (3, 8)))[0].mean(1))


def models():
    """By name; the last one cannot be traced."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 80))
    layers = [
        nn.Unflatten(1, (1, 24)),
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(88, 80),
    ]
    found = {"attention": Attention(), "plain": plain, "convolution": nn.Sequential(*layers), "recurrent": Recurrent()}
    for model in found.values():
        model.eval().requires_grad_(False)
    return found | {"function": lambda x: plain(1.5 * x)}


CALLS = {
    "certified": lambda model, x: fastsal.analyze(model, x, method="certified"),
    "certified, p = inf": lambda model, x: fastsal.analyze(model, x, norm="inf", method="certified"),
    "exact": lambda model, x: fastsal.analyze(model, x, method="exact"),
    "differentiable": lambda model, x: fastsal.analyze(model, x, method="exact", differentiable=True),
    "deepfool": lambda model, x: fastsal.deepfool(model, x, max_steps=5),
    "deepfool, certified": lambda model, x: fastsal.deepfool(model, x, method="certified", max_steps=2),
}


def numbers(result):
    """What is compared of a result."""
    names = ("distance", "steps") if hasattr(result, "steps") else ("linearized_robustness", "runner_up", "bound")
    return [getattr(result, name).detach() for name in names]


def switches():
    """Everything process-wide that a call may have to change for a while."""
    backends = torch.backends
    return {
        "attention": [
            getattr(backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "mem_efficient", "math", "cudnn")
        ],
        "fast path": backends.mha.get_fastpath_enabled(),
        "cudnn": (
            backends.cudnn.enabled,
            backends.cudnn.benchmark,
            backends.cudnn.deterministic,
            backends.cudnn.allow_tf32,
        ),
        "vmap": torch._C._functorch._is_vmap_fallback_enabled(),
        "autocast": (torch.is_autocast_cache_enabled(), torch.is_autocast_enabled("cpu")),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "random numbers": torch.get_rng_state().tolist(),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "threads": torch.get_num_threads(),
    }


def run(count, few, seed=0):
    """Makes `count` calls in THREADS threads, on `few` of the models; returns what was wrong."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    traced.PAYS = 0
    generator, chosen = random.Random(seed), models()
    x = torch.randn(3, 24)
    jobs = [(model, call) for model in list(chosen)[:few] for call in CALLS]
    want = {job: numbers(CALLS[job[1]](chosen[job[0]], x)) for job in jobs}
    chosen, wrong, before = models(), [], switches()  # models of which nothing is known yet
    left = iter([generator.choice(jobs) for _ in range(count)])
    lock = threading.Lock()

    def work():
        while True:
            with lock:
                job = next(left, None)
            if job is None:
                return
            try:
                got = numbers(CALLS[job[1]](chosen[job[0]], x))
                for mine, right in zip(got, want[job], strict=True):
                    torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-6)
            except Exception as error:
                wrong.append(f"{job}: {type(error).__name__}: {str(error)[:300]}")
            if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                wrong.append(f"{job}: a mode of the thread is not what it was")

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = switches()
    return wrong + [f"{name}: {after[name]} was {before[name]}" for name in before if after[name] != before[name]]


def test_eight_threads_on_one_model(run_python):
    result = run_python("-X", "faulthandler", __file__, "40", "1")
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stderr[-2000:]


def test_eight_threads_on_many_models(run_python):
    result = run_python("-X", "faulthandler", __file__, "60", "5", "1")
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stderr[-2000:]


if __name__ == "__main__":
    found = run(*map(int, sys.argv[1:]))
    print("\n".join(found[:20]) or "right")
