"""Twilight decode attention: the plan of a step, the pipeline and SGLang's backend."""
