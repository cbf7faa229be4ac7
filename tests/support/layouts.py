"""The parallel layouts that tests run: name -> (number of processes, flags). Which of them a test runs is the test's choice."""

TP2 = "--tensor-model-parallel-size 2"
TP2_SP = f"{TP2} --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
PP2_VPP3 = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
PP3 = "--pipeline-model-parallel-size 3"
CP2 = "--context-parallel-size 2"
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"

LAYOUTS = {
    "one": (1, ""),
    "recompute": (1, "--recompute-granularity full"),
    "recompute-selective": (1, "--recompute-granularity selective"),
    "recompute-mlp": (1, "--recompute-granularity selective --recompute-modules core_attn mlp"),
    "tp2": (2, TP2),
    "tp2-sp": (2, TP2_SP),
    "tp3": (3, "--tensor-model-parallel-size 3"),
    "pp2": (2, PP2),
    "pp2-uneven": (2, f"{PP2} --decoder-last-pipeline-num-layers 4"),
    "pp2-vpp3": (2, PP2_VPP3),
    "pp3": (3, PP3),
    "tp2-pp2": (4, f"{TP2} {PP2}"),
    "tp2-sp-pp2": (4, f"{TP2_SP} {PP2}"),
    "dp2": (2, ""),
    "dp2-overlap-grad-reduce": (2, "--overlap-grad-reduce"),
    "dp2-distributed-optimizer": (2, "--use-distributed-optimizer"),
    "dp2-overlap": (2, OVERLAP),
    "dp2-overlap-tp2-sp": (4, f"{TP2_SP} {OVERLAP}"),
    "cp2": (2, CP2),
    "cp2-tp2-sp": (4, f"{CP2} {TP2_SP}"),
    "cp2-pp2": (4, f"{CP2} {PP2}"),
    "cp2-dp2-overlap": (4, f"{CP2} {OVERLAP}"),
}
TIED, UNTIED = (f"--untie-embeddings-and-output-weights {value}" for value in (False, True))
STAGES = {"stage1": "--objective response-lm --logits-chunk-size 50", "stage2": "--objective pair-preference"}
