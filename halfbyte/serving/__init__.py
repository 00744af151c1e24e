"""vLLM as a separate program, never imported: the command for it, its process, and a client for its HTTP API."""

from halfbyte.serving.client import Client
from halfbyte.serving.command import ServeCommand, declared_variant, serve_command
from halfbyte.serving.install import VllmInstall, find_vllm
from halfbyte.serving.log import LogFacts, parse_log, root_error
from halfbyte.serving.probe import perplexity, probe
from halfbyte.serving.process import Server, run_in_place
from halfbyte.serving.verify import standing, verify

__all__ = [
    "Client",
    "LogFacts",
    "ServeCommand",
    "Server",
    "VllmInstall",
    "declared_variant",
    "find_vllm",
    "parse_log",
    "perplexity",
    "probe",
    "root_error",
    "run_in_place",
    "serve_command",
    "standing",
    "verify",
]
