"""Files from outside and files for outside: ``documents`` reads and writes JSON and YAML, ``regular`` opens what is
sure to end, ``lock`` keeps a folder to one process, ``shown`` shortens a value for a message."""
