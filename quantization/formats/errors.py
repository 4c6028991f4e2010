"""What readers and writers of formats raise."""


class FormatError(ValueError):
    """What is given is not of the format, or the format cannot hold it; the message says why."""


FormatError.__module__ = "quantization.formats"  # where users find it, and what they see
