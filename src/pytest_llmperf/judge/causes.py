"""What an engine's last words tell of the cause: a table of message shapes and what to do, the most telling first.

A shape is anchored to the words around it: a wrong cause costs more than none. Each is looked for in what a line says, without
its prefixes (`measure.engines.logs`), and never in a line whose level says that nothing went wrong: vLLM's advice "If you are
running out of memory, consider ..." stands in an INFO line.

Words of vLLM 0.8 to 0.33 (and vllm#10481, #17569, #45784), SGLang (sglang#322, #4330), TGI (text-generation-inference#446,
#2238), llama.cpp (llama.cpp#7366), TensorRT-LLM (TensorRT-LLM#260, #5872), torch, transformers and huggingface_hub.
"""

from __future__ import annotations

import re

from pytest_llmperf.measure.engines.logs import complaints

_HUB = r"(?:huggingface\.co|hf\.co|hf-mirror\.com)"
_MODEL = "the model cannot be found: --llmperf-model takes a folder, or a name that the hub has (a private model needs HF_TOKEN)"
_KV = "no room for the KV cache is left after the weights: lower --max-model-len; raise --gpu-memory-utilization or the TP degree"
_CAUSES: tuple[tuple[str, str], ...] = (
    (
        r"(?:CUDA|HIP|XPU|NPU|MPS) out of memory|\btorch\.(?:cuda\.)?OutOfMemoryError|CUDA error: out of memory"
        r"|(?:cudaMalloc|hipMalloc)\w* failed: out of memory|CUDA_ERROR_OUT_OF_MEMORY|hipErrorOutOfMemory|\bNotEnoughMemory\b"
        r"|CUDA runtime error in .*: out of memory|Cuda Runtime \(out of memory\)|due to insufficient GPU memory"
        r"|(?:unable to|failed to) allocate (?:CUDA|ROCm|SYCL|Vulkan)\d+ buffer|is less than desired [CG]PU memory utilization"
        r"|^OutOfMemoryError: ",
        "the GPU has too little free memory: lower --gpu-memory-utilization, --max-model-len or --max-num-seqs (in other engines"
        " their like: --mem-fraction-static, -ngl and -c, --kv_cache_free_gpu_memory_fraction), raise the TP degree, or end the"
        " process that holds the memory",
    ),
    (
        r"No available memory for the cache blocks|larger than the available KV cache memory"
        r"|larger than the maximum number of tokens that can be stored in (?:the )?KV cache",
        _KV,
    ),
    (
        r"Not enough memory\. Please try to increase --mem-fraction-static",
        "no room for the KV cache is left after the weights: raise --mem-fraction-static, or the TP degree",
    ),
    (
        r"is not divisible by (?:weight quantization block_[nk]|(?:min_)?(?:thread_[nk]|tile_size)) = \d",
        "the TP degree cuts a quantized layer within a block: choose a smaller --llmperf-tp, --llmperf-pp in its place, or for a"
        " mixture of experts --enable-expert-parallel",
    ),
    (
        r"(?:attention|query|key.value|kv)[ _]heads?\b.{0,40} must be divisible by (?:the )?tensor[ _-]parallel[ _-]size"
        r"|num(?:_\w+)?_heads\b.{0,40} divisible by .{0,20}(?:tp_size|world_size|tensor_parallel)"
        r"|^AssertionError: \d+ is not divisible by \d+$",
        "the TP degree must divide the model's attention heads: choose another --llmperf-tp, or use --llmperf-pp",
    ),
    (
        r"quarantine:|GPU \d+ is used by |GiB in use, and the driver names no process",
        "the GPU is not free: end the process that uses it, or leave the GPU out with CUDA_VISIBLE_DEVICES",
    ),
    (
        r"no kernel image is available|CUDA driver version is insufficient|compiled with an unsupported toolchain"
        r"|NVIDIA driver on your system is too old|forward compatibility was attempted on non supported HW"
        r"|unsupported display driver / cuda driver combination|undefined symbol: _Z"
        r"|lib(?:cudart|cublas\w*|cudnn\w*|nvrtc|nccl)\.so[.\d]*: cannot open shared object file",
        "this build of vLLM or torch does not fit the GPU or its driver: update the driver, or install the build for its CUDA",
    ),
    (
        r"Error 802: system not yet initialized|CUDA error(?: 802)?: system not yet initialized",
        "the GPUs' switches are not up: start nvidia-fabricmanager, in the driver's version",
    ),
    (
        r"No CUDA GPUs are available|Found no NVIDIA driver on your system|no CUDA-capable device is detected"
        r"|Failed to infer device type|libcuda\.so[.\d]*: cannot open shared object file",
        "the engine sees no GPU: look at nvidia-smi, CUDA_VISIBLE_DEVICES and, in a container, --gpus",
    ),
    (
        r"Bfloat16 is only supported on GPUs with compute capability|only supports sm\d+ and above"
        r"|only supports Ampere GPUs or newer",
        "the GPU is too old for this number format or kernel: --dtype half, or another attention backend",
    ),
    (
        r"CUDA error: (?:an illegal memory access|device-side assert|unspecified launch failure|misaligned address"
        r"|an illegal instruction)|Memory access fault by GPU|\bNVRM: Xid\b|\bXid \(",
        "a kernel failed on the GPU: run once with CUDA_LAUNCH_BLOCKING=1 (marker argument env) for the place; a new kernel,"
        " attention backend or quantization is the first suspect, then the GPU itself (nvidia-smi -q, XID)",
    ),
    (
        r"No such file or directory: '?[^' ]*\b(?:gcc|cc1\w*|g\+\+|nvcc|clang\w*|ninja)\b|Failed to find C compiler"
        r"|Could not find nvcc|Python\.h: No such file or directory|Ninja is required to load"
        r"|InductorError: FileNotFoundError|CppCompileError",
        "torch.compile could not build a kernel: it needs a C compiler (see the environment variable CC), or --enforce-eager",
    ),
    (
        r"\b(?:InductorError|BackendCompilerFailed|TorchRuntimeError): ",
        "torch.compile failed: --enforce-eager shows whether the engine runs without it; versions of torch and the engine that"
        " do not fit are the first suspect",
    ),
    (
        r"\bNCCL (?:error|failure)\b|\bnccl(?:System|UnhandledCuda|Internal|Remote)Error\b|\bDist(?:Network|Store)Error\b"
        r"|Watchdog caught collective operation timeout|NCCL_ERR_",
        "the ranks could not talk to each other: NCCL_DEBUG=INFO says more; check NVLink and shared memory (/dev/shm), or try"
        " --disable-custom-all-reduce",
    ),
    (
        r"\berror: (?:unrecognized arguments|argument \S+: |ambiguous option|the following arguments are required)"
        r"|\berror: (?:unknown|invalid|unexpected) (?:argument|value)\b|\berror while handling argument \""
        r"|^Error: (?:No such option|Invalid value for|Missing (?:option|argument)|Got unexpected extra argument)",
        "an engine argument is wrong: see --llmperf-engine-args",
    ),
    (
        r"\bGatedRepoError\b|\bgated repo\b|Access to model \S+ is restricted|Cannot access gated repo",
        "the model is gated: accept its licence on its page at the hub, and set HF_TOKEN; or name a folder with --llmperf-model",
    ),
    (
        r"Repo id must be in the form|is not a local folder|Repository Not Found|\bRepositoryNotFoundError\b"
        r"|Can't load the configuration|\bHFValidationError\b|\bLocalEntryNotFoundError\b|is not a valid model identifier"
        r"|Invalid repository ID or local directory|does not appear to have a file named config\.json"
        r"|failed to open GGUF file|gguf_init_from_file: failed to open|no such file or directory: '?\S+\.gguf"
        r"|failed to load model from \S+: No such file",
        _MODEL,
    ),
    (
        rf"\b40[13] (?:Client Error|Unauthorized|Forbidden)\b.*\b{_HUB}|\bHfHubHTTPError: 40[13]\b",
        "the hub refuses the token: set HF_TOKEN to one that may read the model, or name a folder with --llmperf-model",
    ),
    (
        rf"\b429 (?:Client Error|Too Many Requests)\b.*\b{_HUB}|\bHfHubHTTPError: 429\b",
        "the hub limits requests: set HF_TOKEN, or download the model before and set HF_HUB_OFFLINE=1",
    ),
    (
        rf"(?:Failed to resolve|couldn't connect to|Could not connect to|host=)\W*(?:https?://)?{_HUB}|\bOfflineModeIsEnabled\b",
        "the hub cannot be reached: download the model before, or name a folder with --llmperf-model",
    ),
    (
        r"pass the argument `?trust_remote_code=True|contains custom code which must be executed"
        r"|requires you to execute the configuration file in that repo",
        "the model brings code of its own: --trust-remote-code, if you trust it",
    ),
    (
        r"Model architectures? \[.*\] (?:is|are) not supported|unknown model architecture: '|does not recognize this architecture"
        r"|Unsupported model type\b|Unknown architecture for AutoModel",
        "this version of the engine does not know the model's architecture: a newer one may",
    ),
    (
        r"max_model_len \(\d+\) is greater than the derived max_model_len",
        "--max-model-len is more than the model takes: lower it",
    ),
    (
        r"Error while deserializing header|MetadataIncompleteBuffer|InvalidHeaderDeserialization|HeaderTooLarge"
        r"|invalid magic characters|model is corrupted or incomplete",
        "a file of weights is damaged or incomplete: download it again",
    ),
    (r"address already in use|couldn't bind HTTP server socket|\bEADDRINUSE\b", "another process took the port first"),
    (r"No module named '?vllm'?(?![\w.])", "the interpreter has no vLLM: name one that has with --llmperf-python"),
    (
        r"No module named '?(?:sglang|tensorrt_llm|mlx_lm|lmdeploy)\b(?!\._)",
        "the interpreter does not have this server: name one that has, with --llmperf-python where the command says {python}",
    ),
    (
        r"No space left on device",
        "a disk is full: look at HF_HOME, TMPDIR, VLLM_CACHE_ROOT, and in a container at /dev/shm",
    ),
    (
        r"\bSIGBUS\b|\bBus error\b|shutdown with signal 7\b|insufficient shared memory"
        r"|unable to (?:write to file|mmap) .*/dev/shm",
        "there is too little shared memory: a container needs --shm-size=1g or --ipc=host",
    ),
    (r"\bToo many open files\b", "the process may not open so many files: ulimit -n"),
    (
        r"\bSIGILL\b|\bIllegal instruction\b|shutdown with signal 4\b",
        "this build uses instructions that the CPU lacks: install one for it",
    ),
    (
        r"^(?:bash: line \d+: |\S+: line \d+: )?\s*(?:\d+ )?Killed(?:\s{2,}.*|\s*\(core dumped\)|: 9)?$|\bSIGKILL\b"
        r"|shutdown with signal 9\b|\bwith (?:exit code|return code|status|code) -9\b|Out of memory: Killed process|\boom-kill:"
        r"|killed due to the node running low on memory",
        "the process was killed, most often because the machine ran out of memory",
    ),
    (
        r"\bstd::bad_alloc\b|Cannot allocate memory|can't allocate memory: you tried to allocate|failed to allocate CPU buffer"
        r"|^MemoryError\b",
        "the machine has too little memory (not the GPU): end what uses it, or take a smaller model or less KV cache",
    ),
)
_PATTERNS = tuple((re.compile(pattern, re.I | re.M), cause) for pattern, cause in _CAUSES)


def likely_cause(log_tail: str) -> str | None:
    """Return the likely cause of an engine's death, with the setting to change, or None."""
    text = "\n".join(complaints(log_tail.splitlines()))
    return next((cause for pattern, cause in _PATTERNS if pattern.search(text)), None)
