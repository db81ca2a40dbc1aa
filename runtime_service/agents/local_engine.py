"""The process that holds a local model: llama.cpp with its HTTP server on 127.0.0.1, as a script.

A process of its own, because xllamacpp holds the interpreter's lock while it loads a model, and a crash of
llama.cpp takes its whole process with it. It knows nothing of the runtime service: one JSON line of settings
comes in on stdin, one JSON line with the address goes out on stdout, and the end of stdin ends it, so that it
never outlives its parent, however that ended.
"""

import json
import os
import sys


def main() -> None:
    """Load the model, say where it listens, and wait for the end of stdin."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever C++ prints must not be taken for the answer
    settings = json.loads(sys.stdin.buffer.readline())

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model_path"]
    params.n_parallel = settings["parallel"]
    params.n_ctx = settings["context_tokens"] * settings["parallel"]
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    # A batch of a prompt cannot be interrupted, and the other slots wait for it; larger ones are no faster.
    params.n_batch = params.n_ubatch = 64
    # An answer that was cancelled keeps its thread for up to a second.
    params.n_threads_http = 2 * settings["parallel"] + 2
    params.api_keys = [settings["api_key"]]
    params.port = 0
    params.ui = False
    # Otherwise old prompts are kept in up to 8 GiB.
    params.cache_ram_mib = 0
    params.warmup = False
    params.verbosity = -1
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        print(json.dumps({"error": str(error)}), file=answer, flush=True)
    else:
        print(json.dumps({"address": server.listening_address}), file=answer, flush=True)
        sys.stdin.buffer.read()
    # Not through llama.cpp's own end, which waits for what it is doing.
    os._exit(0)


if __name__ == "__main__":
    main()
