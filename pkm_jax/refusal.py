"""What is raised where a person's input is at fault, and shown without a traceback."""


class Refusal(ValueError):
    """Something that was handed in cannot be used; the message names it, its value and the remedy.

    Entry points print it in one line. Any other exception is a fault of the program, and they let
    its traceback through.
    """
