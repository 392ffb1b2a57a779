"""Which cause the last words of an engine tell: a table of lines with the right cause, and one of lines that tell none.

The lines are written after those of the engines' sources and of public reports, which `judge/causes.py` names.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge.causes import likely_cause

GPU, KV, BLOCKS, HEADS = "the GPU has too little free memory", "no room for the KV cache", "within a block", "attention heads"
BUILD, NO_GPU, OLD, KERNEL = (
    "does not fit the GPU or its driver",
    "sees no GPU",
    "too old for this number format",
    "kernel failed",
)
COMPILER, COMPILE, NCCL, ARGUMENT = "needs a C compiler", "torch.compile failed", "could not talk", "engine argument is wrong"
GATED, MODEL, TOKEN, LIMIT, HUB = "is gated", "cannot be found", "refuses the token", "limits requests", "cannot be reached"
REMOTE, UNKNOWN, DAMAGED = "code of its own", "does not know the model's architecture", "damaged or incomplete"
PORT, PYTHON, SERVER, DISK = "took the port first", "has no vLLM", "does not have this server", "a disk is full"
SHARED, KILLED, HOST, CPU = "shared memory", "the process was killed", "the machine has too little memory", "instructions"

TELLING = [
    # vLLM
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 3 has a total capacity of 79.10 GiB", GPU),
    ("(VllmWorker rank=1 pid=88) ERROR 05-12 10:00:00 [multiproc_executor.py:522] RuntimeError: CUDA error: out of memory", GPU),
    ("ValueError: Free memory on device (1.3/79.1 GiB) on startup is less than desired GPU memory utilization (0.9,", GPU),
    ("torch.OutOfMemoryError: HIP out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 191.98 GiB", GPU),
    ("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", KV),
    ("ValueError: The model's max seq len (32768) is larger than the maximum number of tokens that can be stored in KV cache"
     " (21328). Try increasing `gpu_memory_utilization`", KV),
    ("[rank0]: ValueError: To serve at least one request with the models's max seq len (131072), (16.00 GiB KV cache is needed,"
     " which is larger than the available KV cache memory (9.50 GiB).", KV),
    ("ValueError: The output_size of gate's and up's weight = 96 is not divisible by weight quantization block_n = 128.", BLOCKS),
    ("(Worker_TP4_EP4 pid=91) ERROR 06-22 10:58:00 [multiproc_executor.py:888] ValueError: Weight input_size_per_partition = 320"
     " is not divisible by weight quantization block_k = 128.", BLOCKS),
    ("ValueError: Weight input_size_per_partition = 3696 is not divisible by min_thread_k = 128. Consider reducing", BLOCKS),
    ("  Value error, Total number of attention heads (14) must be divisible by tensor parallel size (4).", HEADS),
    ("ValueError: num_attention_heads (15) must be divisible by tensor parallel size (2).", HEADS),
    ("AssertionError: 14 is not divisible by 4", HEADS),
    ("ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU has 7.5.", OLD),
    ("RuntimeError: FlashAttention only supports Ampere GPUs or newer.", OLD),
    ("RuntimeError: CUDA error: no kernel image is available for execution on the device", BUILD),
    ("RuntimeError: The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver", BUILD),
    ("ImportError: /v/site-packages/vllm/_C.abi3.so: undefined symbol: _ZN3c106detail14torchInternalAssertFailE", BUILD),
    ("ImportError: libcudart.so.12: cannot open shared object file: No such file or directory", BUILD),
    ("RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized", "nvidia-fabricmanager"),
    ("RuntimeError: No CUDA GPUs are available", NO_GPU),
    ("RuntimeError: Failed to infer device type, please set the environment variable `VLLM_LOGGING_LEVEL=DEBUG`", NO_GPU),
    ("torch.AcceleratorError: CUDA error: device-side assert triggered", KERNEL),
    ("Memory access fault by GPU node-4 (Agent handle: 0x55) on address 0x7f. Reason: Unknown.", KERNEL),
    ("torch._inductor.exc.InductorError: RuntimeError: Failed to find C compiler. Please specify via CC", COMPILER),
    ("FileNotFoundError: [Errno 2] No such file or directory: '/usr/local/cuda/bin/nvcc'", COMPILER),
    ("/tmp/t/main.c:3:10: fatal error: Python.h: No such file or directory", COMPILER),
    ("torch._inductor.exc.InductorError: AssertionError: 3 nodes have no layout", COMPILE),
    ("torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised:", COMPILE),
    ("[rank1]:[E512 10:00:00.123456789 ProcessGroupNCCL.cpp:632] Watchdog caught collective operation timeout", NCCL),
    ("RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)", NCCL),
    ("torch.distributed.DistStoreError: Timed out after 601 seconds waiting for clients. 1/2 clients joined.", NCCL),
    ("vllm: error: argument --dtype: invalid choice: 'fp99' (choose from auto, half)", ARGUMENT),
    ("huggingface_hub.errors.GatedRepoError: 401 Client Error. (Request ID: Root=1-6)", GATED),
    ("OSError: You are trying to access a gated repo.", GATED),
    ("Access to model meta-llama/Llama-3.1-8B is restricted and you are not in the authorized list.", GATED),
    ("huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: Root=1-2)", MODEL),
    ("Repository Not Found for url: https://huggingface.co/api/models/no/such.", MODEL),
    ("OSError: /models/empty does not appear to have a file named config.json.", MODEL),
    ("requests.exceptions.HTTPError: 403 Client Error: Forbidden for url: https://huggingface.co/a/b/resolve/main/x.json", TOKEN),
    ("huggingface_hub.errors.HfHubHTTPError: 429 Client Error: Too Many Requests", LIMIT),
    ("OSError: We couldn't connect to 'https://huggingface.co' to load the files, and", HUB),
    ("ValueError: Please pass the argument `trust_remote_code=True` to allow custom code to be run.", REMOTE),
    ("  Value error, Model architectures ['FooForCausalLM'] are not supported for now. Supported architectures:", UNKNOWN),
    ("ValueError: User-specified max_model_len (99999) is greater than the derived max_model_len (max_position_embeddings=2048)",
     "more than the model takes"),
    ("safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer", DAMAGED),
    ("OSError: [Errno 98] Address already in use", PORT),
    ("/usr/bin/python3: No module named vllm", PYTHON),
    ("OSError: [Errno 28] No space left on device: '/root/.cache/huggingface/x'", DISK),
    ("OSError: [Errno 24] Too many open files", "ulimit -n"),
    ("The engine ended with signal SIGKILL while it was starting.", KILLED),
    ("bash: line 1:  4711 Killed                  python -m vllm.entrypoints.openai.api_server", KILLED),
    ("Killed", KILLED),
    ("subprocess.CalledProcessError: Command '['x']' died with <Signals.SIGKILL: 9>.", KILLED),
    ("[1234.5] Out of memory: Killed process 4711 (python3) total-vm:99kB", KILLED),
    # Ray
    ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.", KILLED),
    ("\x1b[36m(RayWorkerWrapper pid=263, ip=10.0.16.95)\x1b[0m ERROR 01-30 11:53:53 [worker_base.py:620] torch.cuda."
     "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB", GPU),
    # SGLang
    ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. Current value: mem_fraction_static=0.4",
     "raise --mem-fraction-static"),
    ("Exception: Capture cuda graph failed: CUDA out of memory. Tried to allocate 62.00 MiB.", GPU),
    ("/usr/bin/python: Error while finding module specification for 'sglang.launch_server' (ModuleNotFoundError: No module named"
     " 'sglang')", SERVER),
    ("launch_server.py: error: unrecognized arguments: --mem-fraction 0.5", ARGUMENT),
    # Text Generation Inference
    ("2024-06-17T13:18:29.371622Z ERROR shard-manager: text_generation_launcher: Shard process was signaled to shutdown with"
     " signal 9 rank=0", KILLED),
    ("2024-06-17T13:18:29Z ERROR shard-manager: text_generation_launcher: Shard process was signaled to shutdown with signal 7",
     SHARED),
    ("2024-07-16T10:00:00Z ERROR text_generation_launcher: Shard process was signaled to shutdown with signal 4 rank=0", CPU),
    ('{"timestamp":"2025-01-01T00:00:00Z","level":"ERROR","fields":{"message":"Error when initializing model\\n'
     'torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"},"target":"text_generation_launcher"}', GPU),
    ("error: unexpected argument '--model' found", ARGUMENT),
    # llama.cpp
    ("ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9000.00 MiB on device 0: cudaMalloc failed: out of memory", GPU),
    ("llama_model_load: error loading model: unable to allocate CUDA0 buffer", GPU),
    ("llama_model_load: error loading model: unable to allocate CPU buffer\nalloc_tensor_range: failed to allocate CPU buffer of"
     " size 437944320", HOST),
    ("gguf_init_from_file: failed to open GGUF file '/m/none.gguf'", MODEL),
    ("llama_model_load: error loading model: error loading model architecture: unknown model architecture: 'qwen9'", UNKNOWN),
    ("gguf_init_from_file_impl: invalid magic characters: '<htm', expected 'GGUF'", DAMAGED),
    ("error: invalid argument: --ngll", ARGUMENT),
    ("0.00.012.345 E srv    llama_server: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080", PORT),
    # TensorRT-LLM
    ("[07/08/2025-19:47:15] [TRT-LLM] [RANK 1] [E] Failed to initialize executor on rank 1: Executor creation failed due to"
     " insufficient GPU memory.", GPU),
    ("[TensorRT-LLM][ERROR] CUDA runtime error in ::cudaMallocAsync(ptr, n, s): out of memory (/app/tllmBuffers.h:9)", GPU),
    ("Error: No such option: --max_batch", ARGUMENT),
    ("terminate called after throwing an instance of 'std::bad_alloc'", HOST),
]  # fmt: skip

SILENT = [
    "",
    "INFO 05-12 10:00:00 [model_runner.py:1562] CUDA graphs can take additional 1~3 GiB memory per GPU. If you are running out of"
    " memory, consider decreasing `gpu_memory_utilization` or enforcing eager mode.",
    "WARNING 10-26 16:13:52 [_custom_ops.py:19] Failed to import from vllm._C with"
    " ModuleNotFoundError(\"No module named 'vllm._C'\")",
    "a skilled operator killed_requests=3 overkill",
    "num_killed: 0, killed_requests: 12",
    "the requests were killed by the client",
    "RuntimeError: request 12 was killed",
    "ValueError: Tensor height 576 is not divisible by block_height 128.",
    "ValueError: max_num_batched_tokens (1000) is not divisible by 16",
    "Error: Number of GPUs (6) must be divisible by tensor_parallel_size (4)",
    "ValueError: image height must be divisible by patch size (14)",
    "RuntimeError: alloc_req_slots runs out of memory. Please set a smaller number for `--max-running-requests`.",
    "INFO 05-12 10:00:00 [cuda_communicator.py:77] vLLM is using nccl==2.21.5",
    "NCCL version 2.21.5+cuda12.4",
    "[2025-09-22 10:25:22 DP1 PP1] Capture cuda graph begin. This can take up to several minutes. avail mem=8.73 GB",
    "(EngineCore pid=7) WARNING 06-21 07:20:49 [core.py:9] Address already in use is tolerated here",
    '{"timestamp":"2025-01-01T00:00:00Z","level":"WARN","fields":{"message":"Could not find nvcc, CUDA out of memory"}}',
    "requests.exceptions.HTTPError: 403 Client Error: Forbidden for url: https://bucket.example.com/weights",
    "HTTP/1.1 401 Unauthorized",
    "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.",
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    "The engine ended with exit code 1 while it was starting.",
    "AssertionError",
    "KeyError: 'layers.0.self_attn.qkv_proj.weight'",
    "/opt/ggml/src/ggml-backend.cpp:194: GGML_ASSERT(buffer) failed",
    "main: exiting due to model loading error",
    "ModuleNotFoundError: No module named 'vllm_plugin'",
    "invalid choice of seed, taking 0",
    "gcc version 12.2.0 is used",
    "the Xidea architecture",
    "user error: oomph",
    "INFO:     127.0.0.1:43278 - \"GET /killed HTTP/1.1\" 200 OK",
    "time=2025-03-07T05:36:39.884Z level=INFO source=sched.go:1 msg=\"Killed\"",
]  # fmt: skip


@pytest.mark.parametrize(("line", "cause"), TELLING, ids=[f"{number}" for number, _ in enumerate(TELLING)])
def test_a_line_tells_its_cause_wherever_it_stands(line: str, cause: str) -> None:
    for log in (line, f"Traceback (most recent call last):\n{line}\n", "\n".join([*SILENT, line, *SILENT])):
        assert cause in (likely_cause(log) or "none")


@pytest.mark.parametrize("line", SILENT)
def test_a_line_that_tells_nothing_has_no_cause(line: str) -> None:
    assert likely_cause(line) is None


def test_there_are_many_lines_of_either_sort() -> None:
    assert len(TELLING) >= 40
    assert len(SILENT) >= 20


@given(st.text())
def test_no_text_makes_the_search_fail(text: str) -> None:
    likely_cause(text)


@given(
    st.lists(st.sampled_from([line for line, _ in TELLING] + SILENT), max_size=4), st.text('\x1b[]()=:{}" pid0|E\n', max_size=9)
)
def test_damage_between_telling_lines_raises_nothing(lines: list[str], damage: str) -> None:
    likely_cause(damage.join(lines))
