"""Comparison of the names that TokenCake uses of vLLM with the sources of a vLLM version, without executing vLLM.

`python -m scripts.compat` (`make compat`) downloads the wheels of every supported version and of the newest release,
unpacks their Python files and reads them. `python -m scripts.compat --installed` reads the installed vLLM, offline.
The used names are read from TokenCake's own sources:

- every `from vllm... import name`, wherever it is, and every attribute of an imported module or class;
- every attribute of `self` in a subclass of a vLLM class, and of a parameter annotated with a vLLM class;
- every method that overrides a vLLM method, also in a mixin before vLLM's class: it must accept each call that vLLM's
  own signature accepts, and be of the same kind (property, static, class or async method);
- every call of an imported function or class, and of `super()`;
- every abstract method that a TokenCake class has to implement.

Several versions are also compared with each other. An override of a method that a newer version no longer has is never
called. A name reached through an object of unknown type is reported if no vLLM class has it any more. `make compat`
also runs mypy on TokenCake's packages with each version, which follows the type of every object.

Limits: for objects typed `Any` only names are compared, and only between versions. Strings are not read: entry points,
flags, environment variables, class names in settings. A name that still exists may behave differently;
`docs/compatibility.md` lists the versions with which the tests and an engine were run.
"""
