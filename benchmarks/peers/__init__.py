"""The race: other quantizers and ours on one model, one calibration, one processor, judged by one evaluator."""
