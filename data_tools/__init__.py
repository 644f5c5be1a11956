"""Tools that bring data into shape for streaming; `python -m data_tools --help`. No torch in this room."""
