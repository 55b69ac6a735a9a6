"""How XLA compiles in tests: thousands of small programs, which run a few times each."""

from importlib import metadata

FLAGS = " --xla_cpu_parallel_codegen_split_count=1"
AS_USERS_DO = {}  # compiler options of what is proved about a compiled program
minor = int(metadata.version("jaxlib").split(".")[1])
if minor < 11:  # which has two ways to compile a fusion
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
    AS_USERS_DO["xla_cpu_use_fusion_emitters"] = True
