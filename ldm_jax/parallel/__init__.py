"""Where arrays live and how a step is mapped over devices and hosts."""
