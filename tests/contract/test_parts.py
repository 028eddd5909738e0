import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reclora_dist.contract import schema
from reclora_dist.contract.manifest import ContractError
from reclora_dist.contract.parts import open_part, read_part, read_parts, write_arrow_part, write_part
from reclora_dist.contract.storage import Folder


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path / "data"))


def table(start, stop):
    return pa.table({"user": pa.array(range(start, stop), pa.int32())})


def test_row_groups_are_bounded_and_recorded(folder):
    entry = write_part(folder, "events/", 3, table(0, 25), 10)
    assert entry.path.startswith("events/part-00003-")
    assert entry.row_groups == (10, 10, 5)
    assert entry.rows == 25
    stored = open_part(folder, entry)
    assert [stored.metadata.row_group(i).num_rows for i in range(stored.num_row_groups)] == [10, 10, 5]


def test_every_row_group_has_statistics_and_few_values_a_dictionary(folder):
    levels = pa.array([[1, 2]] * 20, pa.list_(pa.int8(), 2))
    columns = {"user": pa.array(range(20), pa.int32()), "level": levels, "split": pa.array(["train"] * 20)}
    stored = open_part(folder, write_part(folder, "", 0, pa.table(columns), 10)).metadata
    users = [stored.row_group(group).column(0).statistics for group in range(2)]
    assert [(found.min, found.max, found.null_count) for found in users] == [(0, 9, 0), (10, 19, 0)]
    encodings = [set(stored.row_group(0).column(place).encodings) for place in range(3)]
    assert ["RLE_DICTIONARY" in found for found in encodings] == [False, True, True]


def test_equal_contents_have_equal_names(folder):
    first, again, other = (write_part(folder, "", 0, table(0, n), 10) for n in (5, 5, 6))
    assert first == again
    assert first.path != other.path


def test_parts_are_read_in_path_order(folder):
    second, first = write_part(folder, "", 1, table(5, 9), 10), write_part(folder, "", 0, table(0, 5), 10)
    assert read_parts(folder, [second, first]).column("user").to_pylist() == list(range(9))
    assert read_parts(folder, [first], ["user"]).num_columns == 1


def test_a_flipped_byte_in_a_shard_is_refused_before_it_is_parsed(folder):
    entry = write_part(folder, "", 0, table(0, 1000), 100)
    content = bytearray(folder.read(entry.path))
    content[len(content) // 2] ^= 1
    folder.write(entry.path, bytes(content))
    with pytest.raises(ContractError, match="Rebuild the dataset or restore the file"):
        read_parts(folder, [entry])


def test_an_arrow_part_gives_back_its_rows_and_columns(folder):
    lists = pa.FixedSizeListArray.from_arrays(pa.array(range(100), pa.int32()), 2)
    levels, splits = pa.array(range(50), pa.int8()), pa.array(["train"] * 50)
    whole = pa.table({"user": pa.array(range(50), pa.int32()), "level": levels, "long_items": lists, "split": splits})
    entry = write_arrow_part(folder, "histories/", 0, [whole], 20)
    assert entry.row_groups == (20, 20, 10)
    assert read_part(folder, entry).equals(whole)
    assert read_part(folder, entry, ["split", "user"]).equals(whole.select(["split", "user"]))
    chunked = pa.concat_tables([whole.slice(0, 7), whole.slice(7)])
    assert write_arrow_part(folder, "histories/", 0, [chunked], 20) == entry


def test_an_arrow_part_follows_from_its_rows_however_they_come(folder):
    columns = {"label": pa.array(range(100), pa.int8()), "split": pa.array(["train", "test"] * 50)}
    whole = pa.table({name: pa.concat_arrays([column] * 5) for name, column in columns.items()})
    entry = write_arrow_part(folder, "histories/", 0, [whole], 130)
    for step in (1, 7, 130, 194, 499):
        some = [whole.slice(start, step) for start in range(0, 500, step)]
        assert write_arrow_part(folder, "histories/", 0, some, 130) == entry


def test_a_damaged_arrow_part_is_refused(folder):
    entry = write_arrow_part(folder, "", 0, [table(0, 1000)], 100)
    folder.write(entry.path, folder.read(entry.path)[:-1])
    with pytest.raises(ContractError, match="Rebuild the dataset or restore the file"):
        read_part(folder, entry)


def test_no_part_is_named(folder):
    with pytest.raises(ValueError, match="no part matches"):
        read_parts(folder, [])


def test_an_empty_table_is_a_part_without_row_groups(folder):
    entry = write_part(folder, "quarantine/", 0, schema.quarantine.empty_table(), 10)
    assert entry.rows == 0
    assert read_parts(folder, [entry]).schema.equals(schema.quarantine)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("events", schema.events),
        ("items", schema.items(2)),
        ("users", schema.users(3)),
        ("histories", schema.histories(60, 10)),
        ("crm", schema.crm_shard(3, 60)),
        ("text", schema.text_shard(3, 60, 10)),
    ],
)
def test_schemas_survive_parquet(name, found):
    sink = pa.BufferOutputStream()
    pq.write_table(found.empty_table(), sink)
    assert pq.read_schema(pa.BufferReader(sink.getvalue())).equals(found), name
    assert all(not field.nullable for field in found)


def test_shards_have_lists_of_fixed_length_and_share_the_sample():
    crm, text = schema.crm_shard(4, 60), schema.text_shard(4, 60, 10)
    assert text.names[: len(crm.names)] == crm.names
    for field in text:
        assert not pa.types.is_list(field.type), field.name
    assert text.field("long_items").type == pa.list_(pa.int32(), 60)
    assert text.field("short_levels").type == pa.list_(pa.int8(), 10)
    assert crm.field("statistics").type == pa.list_(pa.float32(), len(schema.STATISTICS))


def test_formats_are_distinct():
    formats = [value for value in vars(schema).values() if isinstance(value, schema.Format)]
    assert len({f.name for f in formats}) == len(formats) >= 9
    assert all(f.name.startswith("reclora.") for f in formats)
