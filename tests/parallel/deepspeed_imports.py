"""What a rank with DeepSpeed imports, for a fork server: seconds, most of them for the compiler
that one of its optimizers names."""

from tests.parallel import deepspeed_on_cpu

deepspeed_on_cpu.apply()

import deepspeed.runtime.zero.utils  # noqa: E402, F401
import torch._dynamo.repro.after_dynamo  # noqa: E402
import torch._inductor.compile_fx  # noqa: E402, F401

import opt_train.parallel.deepspeed_engine  # noqa: E402, F401
