"""Sub-commands of `piflow`, one function each."""
