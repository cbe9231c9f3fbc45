"""XLA's flags for programs that are compiled once and run a few times."""

# The older code generator takes a third of the newer one's time. jax 0.12 lacks it and ignores the option.
# A program is not cut into parts to be compiled side by side: the suite's processes keep every core busy.
FAST = (
    "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_parallel_codegen_split_count=1"
)
