"""Events in the files of other tools: one file a format, and `registry`, the table of them."""
