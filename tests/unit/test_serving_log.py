"""What halfbyte reads out of vLLM's log."""

from halfbyte.serving.log import LogFacts, parse_log, root_error, stages_reached

STARTED = """\
(APIServer pid=7) INFO 11-24 00:44:05 [model.py:733] Resolved architecture: LlamaForCausalLM
(EngineCore pid=8) INFO 11-24 00:44:11 [core.py:133] Initializing a V1 LLM engine (v0.26.0) with config: \
model='m', quantization=gptq_marlin, quantization_config=None, kv_cache_dtype=auto
(Worker pid=9) INFO 11-24 00:44:17 [model.py:68] Starting to load model m...
(Worker pid=9) INFO 11-24 00:44:17 [gptq.py:9] Using MacheteLinearKernel for GPTQMarlinLinearMethod
(Worker pid=9) INFO 11-24 00:44:17 [gptq.py:9] Using MacheteLinearKernel for GPTQMarlinLinearMethod
(Worker pid=9) INFO 11-24 00:44:19 [default_loader.py:501] Loading weights took 1.23 seconds
(Worker pid=9) INFO 11-24 00:44:19 [runner.py:5150] Model loading took 5.39 GiB memory and 3.1 seconds
(Worker pid=9) INFO 11-24 00:44:20 [worker.py:1] Available KV cache memory: 61.25 GiB
(EngineCore pid=8) INFO 11-24 00:44:20 [kv_cache_utils.py:2327] GPU KV cache size: 46,592 tokens, Maximum 91.00x
"""
FAILED = """\
(APIServer pid=7) WARNING 11-24 00:48:16 [u.py:255] This can cause fd limit errors like `OSError: [Errno 24] Too many`
(Worker pid=9) ERROR 11-24 00:48:27 [multiproc_executor.py:953] Traceback (most recent call last):
(Worker pid=9) ERROR 11-24 00:48:27 [multiproc_executor.py:953]   File "/x/linear/__init__.py", line 1243, in init
(Worker pid=9) ERROR 11-24 00:48:27 [multiproc_executor.py:953]     raise ValueError(
(Worker pid=9) ERROR 11-24 00:48:27 [multiproc_executor.py:953] ValueError: no kernel for NVFP4
(EngineCore pid=8) ERROR 11-24 00:48:29 [core.py:1510] Exception: WorkerProc initialization failed due to an exception \
in a background process. See stack trace for root cause.
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}
"""
CHAINED = """\
KeyError: 'llama9'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
transformers.errors.ConfigError: model type llama9 is unknown
"""
PYDANTIC = """\
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, max_model_len (999999) is greater than 8192 [type=value_error, input_value=ArgsKwargs((), {})]
    For further information visit the documentation
"""


def test_facts_of_a_started_server():
    assert parse_log(STARTED) == LogFacts(5.39, 61.25, 46592, "gptq_marlin", ("MacheteLinearKernel",))
    assert stages_reached(STARTED) == 5


def test_what_is_not_said_is_none():
    cpu = "INFO [w.py:260] Explicitly set (1.0/8.34) GiB for KV cache on node 0.\nconfig: quantization=None, x=1"
    assert parse_log(cpu) == LogFacts(None, 1.0, None, None, ())
    assert stages_reached("") == 0


def test_the_root_error_is_the_innermost_one():
    assert root_error(FAILED) == "ValueError: no kernel for NVFP4"


def test_a_chained_error_gives_the_one_that_came_of_it():
    assert root_error(CHAINED) == "transformers.errors.ConfigError: model type llama9 is unknown"


def test_pydantic_detail_and_usage_errors():
    assert root_error(PYDANTIC) == "max_model_len (999999) is greater than 8192"
    assert root_error("usage: vllm serve\nvllm serve: error: argument --dtype: invalid choice: 'bf16'") == (
        "argument --dtype: invalid choice: 'bf16'"
    )


def test_an_error_that_says_nothing_on_its_line_is_told_by_the_next():
    log = (
        "(APIServer pid=2) RuntimeError: \n(APIServer pid=2)         An attempt has been made\n(APIServer pid=2) rest\n"
    )
    assert root_error(log) == "RuntimeError: An attempt has been made"
    assert root_error("RuntimeError: \n\n") == "RuntimeError:"


def test_without_an_error_the_last_line_is_told():
    assert root_error("one\n(Worker pid=9) INFO 11-24 00:44:20 [w.py:1] two\n\n") == "two"
    assert root_error("") == "it said nothing"
    assert len(root_error("ValueError: " + "x" * 5000)) <= 400
