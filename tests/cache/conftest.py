import pytest


@pytest.fixture
def cache(tmp_path):
    """The folder of seven sequences in three files."""
    from cached import write  # here: on a machine without pyarrow this file is imported too

    write(tmp_path / "cache", 7)
    return tmp_path / "cache"
