"""Comparison of what TokenCake uses of vLLM with what the sources of a vLLM hold; nothing of vLLM is executed.

`python -m scripts.compat` (`make compat`) downloads the wheels of every supported version and of the newest release,
unpacks their Python files and reads them. `python -m scripts.compat --installed` reads the installed vLLM, offline.
What is used is read from our own sources, too:

- every `from vllm... import name`, wherever it stands, and every attribute of an imported module or class;
- every attribute of `self` in a class that inherits from vLLM's, and of a parameter annotated with a class of vLLM's;
- every method that overrides one of vLLM's, also in a mixin that stands before vLLM's class: it must accept each call
  that vLLM's own signature accepts, and be of the same kind (property, static, class or async method);
- every call of an imported function or class, and of `super()`;
- every abstract method that a class of ours would have to implement.

Several versions are also compared with each other: a method that vLLM called in an older version and has no longer is
never called, and a name reached through an object of unknown type is missed where no class of vLLM's has it any more.
`make compat` also lets mypy check our packages against each version, which follows the types of every object.

Limits. Objects typed `Any` are known by names alone, and only between versions. Strings are not read: entry points,
flags, environment variables, classes named in settings. That a name is there does not mean that it still does the same:
`docs/compatibility.md` says with which versions the tests and an engine were run.
"""
