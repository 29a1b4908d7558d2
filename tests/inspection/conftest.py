from tests.prediction.conftest import folder_of  # noqa: F401
