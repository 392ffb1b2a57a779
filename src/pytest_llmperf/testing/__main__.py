"""`python -m pytest_llmperf.testing --port N ...`: the simulated engine in the place of `vllm serve`.

It takes vLLM's own argument names, so that what starts an engine need not know which one, and prints vLLM's log lines.
The arguments that begin with --sim- say how fast it is and how it fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import sys
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pytest_llmperf.testing import gpus
from pytest_llmperf.testing.clock import Clock
from pytest_llmperf.testing.realtime import event_loop
from pytest_llmperf.testing.server import Options, serve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.testing.server import Server

OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB "
    "of which 1.02 GiB is free."
)

PACE = "LLMPERF_SIMULATED_PACE"
"""The environment variable with a factor on every duration: on a busy machine what disturbs is then a smaller share of it."""

# Arguments of vLLM that change nothing here.
_UNUSED = (
    "--attention-backend", "--compilation-config", "--cpu-offload-gb", "--distributed-executor-backend", "--dtype",
    "--generation-config", "--gpu-memory-utilization", "--kv-cache-dtype", "--kv-cache-memory-bytes", "--load-format",
    "--moe-backend", "--quantization", "--shutdown-timeout", "--speculative-config", "--stream-interval", "--tokenizer",
    "--uvicorn-log-level",
)  # fmt: skip
_UNUSED_SWITCHES = (
    "--async-scheduling", "--disable-log-stats", "--disable-uvicorn-access-log", "--enable-chunked-prefill",
    "--enable-expert-parallel", "--enable-log-requests", "--enforce-eager", "--trust-remote-code",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: a mistyped argument must fail, as it does in a real run.
    parser = argparse.ArgumentParser("pytest_llmperf.testing", description=__doc__, allow_abbrev=False)
    default, clock = Options(), Clock()
    parser.add_argument("--host", default=default.host)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default=default.model)
    parser.add_argument("--served-model-name", metavar="NAME", nargs="+", help="default: the model")
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", "-pp", type=int, default=1, help="changes the log's ranks only")
    parser.add_argument("--data-parallel-size", "-dp", type=int, default=1, help="changes nothing")
    parser.add_argument("--max-num-seqs", type=int, default=clock.max_num_seqs)
    parser.add_argument("--max-num-batched-tokens", type=int, default=clock.max_num_batched_tokens)
    parser.add_argument("--max-model-len", type=int, default=default.max_model_len)
    parser.add_argument("--num-gpu-blocks-override", type=int, default=clock.num_gpu_blocks)
    parser.add_argument("--block-size", type=int, default=clock.block_size)
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, help="changes nothing; see --sim-noise-seed")
    key = os.environ.get("VLLM_API_KEY")
    parser.add_argument("--api-key", metavar="KEY", nargs="+", default=[key], help="default: VLLM_API_KEY of the environment")
    for name in _UNUSED:
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in _UNUSED_SWITCHES:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, help=argparse.SUPPRESS)
    _add_simulation(parser.add_argument_group("simulation"), default, clock)
    return parser


def _add_simulation(group: argparse._ArgumentGroup, default: Options, clock: Clock) -> None:
    number = group.add_argument
    number("--sim-step-s", type=float, default=clock.step_s, metavar="S", help="decode step of an empty batch")
    number("--sim-sequence-s", type=float, default=clock.sequence_s, metavar="S", help="added per running sequence")
    number("--sim-prefill-token-s", type=float, default=clock.prefill_token_s, metavar="S", help="per prompt token")
    number("--sim-communication-s", type=float, default=clock.communication_s, metavar="S", help="per step and TP rank")
    number("--sim-slow-down", type=float, default=1.0, metavar="X", help="factor on every duration")
    number("--sim-idle-slow-down", type=float, default=1.0, metavar="X", help="factor once it has idled for --sim-idle-s")
    number("--sim-idle-s", type=float, default=clock.idle_s, metavar="S", help="see --sim-idle-slow-down")
    number("--sim-launch-cv", type=float, default=0.0, metavar="CV", help="noise between launches")
    number("--sim-round-cv", type=float, default=0.0, metavar="CV", help="noise between rounds")
    number("--sim-noise-seed", type=int, default=0, metavar="N")
    number("--sim-launch", type=int, default=0, metavar="N", help="index of this launch, for its noise")
    number("--sim-launch-file", metavar="PATH", help="count the launches in this file instead, from 0")
    number("--sim-round-gap-s", type=float, default=default.round_gap_s, metavar="S", help="pause that ends a round")
    number("--sim-version", default=default.version, metavar="V")
    number("--sim-startup-s", type=float, default=0.0, metavar="S", help="until /health answers")
    number("--sim-fail-every", type=int, metavar="N", help="HTTP 500 for each Nth generation request")
    number("--sim-cut-every", type=int, metavar="N", help="cut each Nth answer in the middle")
    number("--sim-preemptions", type=int, default=0, metavar="N", help="report N more per round")
    number("--sim-crash-at-start", nargs="?", const=OUT_OF_MEMORY, metavar="MESSAGE", help="default: out of memory")
    number("--sim-crash-after", type=int, metavar="N", help="exit with 1 when the request after the Nth arrives")
    number("--sim-hang-after", type=int, metavar="N", help="no more tokens from the request after the Nth on")
    number("--sim-stop-s", type=float, default=0.0, metavar="S", help="from SIGTERM to the exit; inf: ignore it")
    number("--sim-gpu-memory-gib", type=float, default=16.0, metavar="GIB", help="of each rank's GPU")
    number("--sim-extra-memory-gib", metavar="GIB,...", help="more of it, rank by rank")
    number("--sim-children", type=int, default=0, metavar="N", help="idle children that ignore SIGTERM")


def _options(args: argparse.Namespace) -> Options:
    clock = _named(Clock, args) | {
        "tp": args.tensor_parallel_size,
        "slow_down": args.sim_slow_down * float(os.environ.get(PACE, "1")),
        "num_gpu_blocks": args.num_gpu_blocks_override,
        "prefix_cache": args.enable_prefix_caching,
        "seed": args.sim_noise_seed,
        "launch": _count_launch(args.sim_launch_file) if args.sim_launch_file else args.sim_launch,
        "preemptions_per_round": args.sim_preemptions,
    }
    model, *aliases = args.served_model_name or [args.model]
    names = {"model": model, "aliases": tuple(aliases), "api_key": args.api_key[0], "further_api_keys": tuple(args.api_key[1:])}
    dev_endpoints = os.environ.get("VLLM_SERVER_DEV_MODE", "1") != "0"
    return Options(**_named(Options, args) | names, clock=Clock(**clock), dev_endpoints=dev_endpoints)


def _named(kind: type[Clock | Options], args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that have the name of a field: `--sim-step-s` is `step_s`."""
    values = {name.removeprefix("sim_"): value for name, value in vars(args).items()}
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def _count_launch(path: str) -> int:
    # O_APPEND, so that engines that start at once still get different numbers.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, b".")
        return os.lseek(file, 0, os.SEEK_CUR) - 1
    finally:
        os.close(file)


def _log(who: str, text: str, level: str = "INFO") -> None:
    print(f"({who} pid={os.getpid()}) {level} {time.strftime('%m-%d %H:%M:%S')} {text}", flush=True)


def _log_start(options: Options, args: argparse.Namespace) -> None:
    tp, pp = args.tensor_parallel_size, args.pipeline_parallel_size
    _log("APIServer", f"[api_utils.py:347]   version {options.version}")
    _log("APIServer", f"[api_utils.py:347]   model   {args.model}")
    for rank in range(tp * pp):
        place = f"DP rank 0, PP rank {rank // tp}, PCP rank 0, TP rank {rank % tp}, ETP rank 0, EP rank N/A"
        where = f"rank {rank} in world size {tp * pp} is assigned as {place}"
        _log(f"Worker_TP{rank % tp}", f"[parallel_state.py:2350] {where}")
    tokens, longest = options.clock.kv_tokens, options.max_model_len
    size = f"GPU KV cache size: {tokens:,} tokens, Maximum concurrency for {longest:,} tokens per request"
    _log("EngineCore", f"[kv_cache_utils.py:2327] {size}: {tokens / longest:.2f}x")


def _crash_at_start(message: str) -> int:
    _log("EngineCore", "[core.py:1210] EngineCore failed to start.", "ERROR")
    frames = 'Traceback (most recent call last):\n  File "vllm/v1/engine/core.py", line 1184, in run_engine_core\n'
    for line in [*frames.splitlines(), "    engine_core = EngineCoreProc(*args, **kwargs)", message]:
        _log("EngineCore", f"[core.py:1210] {line}", "ERROR")
    print("RuntimeError: Engine core initialization failed. See root cause above.", file=sys.stderr, flush=True)
    return 1


def _occupy_gpus(args: argparse.Namespace) -> None:
    """Use the memory of one GPU for each rank, those of CUDA_VISIBLE_DEVICES first."""
    ranks = args.tensor_parallel_size * args.pipeline_parallel_size * args.data_parallel_size
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(ranks)))
    more = [float(word) for word in (args.sim_extra_memory_gib or "").split(",") if word]
    used = [args.sim_gpu_memory_gib + (more[rank] if rank < len(more) else 0.0) for rank in range(ranks)]
    places = [int(word) for word in allowed.split(",")]
    gpus.occupy({gpu: int(gib * gpus.GIB) for gpu, gib in zip(places, used, strict=False)})


def _fork_children(count: int) -> None:
    # SIGTERM is ignored before the fork: a child that it ends before the child can ignore it would prove nothing.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for index in range(count):
        child = os.fork()
        if child == 0:
            time.sleep(600)  # it ends, even where a test leaves it behind
            os._exit(0)
        _log("EngineCore", f"[multiproc_executor.py:153] started worker {index} with pid {child}")
    signal.signal(signal.SIGTERM, before)


def _die() -> None:
    _log("EngineCore", "[core.py:1219] EngineCore encountered a fatal error.", "ERROR")
    os._exit(1)


async def _run(options: Options, stop_s: float) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    running: list[Server] = []

    def shut_down() -> None:
        _log("APIServer", "[launcher.py:254] [shutdown] API server: shutdown triggered")
        if math.isfinite(stop_s):
            loop.call_later(stop_s, stop.set)

    def on_signal(*_: object) -> None:
        # While a round is computed the loop does not come to hear of a signal.
        if stop_s == 0 and any(server.plays for server in running):
            raise SystemExit(0)
        loop.call_soon_threadsafe(shut_down)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)

    def started(server: Server) -> None:
        running.append(server)
        _log("APIServer", f"[entry.py:140] Starting vLLM server on http://{options.host}:{server.port}")
        print("INFO:     Application startup complete.", file=sys.stderr, flush=True)

    await serve(options, stop, crash=_die, started=started)
    print("INFO:     Application shutdown complete.", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the engine until SIGTERM or SIGINT; return the exit status: 0, or 1 when it cannot start."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        options = _options(args)
    except ValueError as error:
        parser.error(str(error))
    if gpus.STATE in os.environ:  # without a shared folder no other process can see the memory in use
        _occupy_gpus(args)
    _fork_children(args.sim_children)
    _log_start(options, args)
    if args.sim_crash_at_start is not None:
        return _crash_at_start(args.sim_crash_at_start)
    try:
        with asyncio.Runner(loop_factory=event_loop) as runner:
            runner.run(_run(options, args.sim_stop_s))
    except OSError as error:
        address = f"('{options.host}', {options.port})"
        where = f"[Errno {error.errno}] error while attempting to bind on address {address}"
        print(f"ERROR:    {where}: {os.strerror(error.errno or 0).lower()}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    # Arguments that hold secrets: a command line is everybody's to read.
    sys.exit(main([*sys.argv[1:], *json.loads(os.environ.pop("LLMPERF_ARGUMENTS", "[]"))]))
