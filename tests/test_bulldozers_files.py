"What a file of sales may not do: unpack to gigabytes, pose as another, or hang"
import io, os, struct, tracemalloc, zipfile
import pytest
from fastai_dropconnect.bulldozers import files
from fastai_dropconnect.bulldozers.data import read_bulldozers
from fastai_dropconnect.bulldozers.synthetic import synthetic_bulldozers
from fastai_dropconnect.cli import dropconnect_bulldozers
from fastai_dropconnect.tabular.data import DataError

SALES = synthetic_bulldozers(30, seed=2)
CSV = SALES.to_csv(index=False).encode()


def zipped(*members, method=zipfile.ZIP_DEFLATED):
    "Bytes of an archive with `members`, pairs of name and content"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', method, compresslevel=9) as z:
        for name,content in members: z.writestr(name, content)
    return buffer.getvalue()

def bomb(n_bytes):
    "An archive whose CSV has a true header and `n_bytes` of commas"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as z, z.open('Train.csv', 'w', force_zip64=True) as f:
        f.write(CSV)
        for _ in range(n_bytes//2**20): f.write(b','*2**20)
    return buffer.getvalue()

def with_size(data, size):
    "The same archive, whose headers claim that its only member unpacks to `size` bytes"
    data = bytearray(data)
    directory = data.rindex(b'PK\1\2')
    struct.pack_into('<I', data, directory+24, size)
    struct.pack_into('<I', data, 22, size)
    return bytes(data)

def peak_of_refusing(path, match):
    "Most bytes that Python held while the file was refused"
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=match): read_bulldozers(path)
        return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


# --- archives that are larger inside than outside

def test_a_bomb_is_refused_before_memory_is_taken(tmp_path):
    (tmp_path/'a.zip').write_bytes(bomb(200*2**20))
    says = r'a.zip: Train.csv in it unpacks to 0.2 GiB, \d+ times its packed size; .* refused without `allow_large`'
    assert peak_of_refusing(tmp_path/'a.zip', says) < 4*2**20

def test_a_bomb_whose_header_lies_is_refused_as_well(tmp_path):
    (tmp_path/'a.zip').write_bytes(with_size(bomb(200*2**20), 1000))
    assert peak_of_refusing(tmp_path/'a.zip', 'not a zip archive that can be read') < 40*2**20

def test_unpacked_bytes_are_counted():
    assert files._read_at_most(io.BytesIO(b'abc'), 3, 'f') == b'abc'
    with pytest.raises(DataError, match='f holds more'): files._read_at_most(io.BytesIO(b'abcd'), 3, 'f')

def test_a_large_csv_needs_the_flag_zipped_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'MAX_BYTES', len(CSV)-1)
    for name,content in {'a.csv': CSV, 'a.zip': zipped(('Train.csv', CSV))}.items():
        (tmp_path/name).write_bytes(content)
        with pytest.raises(DataError, match='refused without `allow_large`'): read_bulldozers(tmp_path/name)
        assert len(read_bulldozers(tmp_path/name, allow_large=True)) == 30

def test_a_csv_of_short_rows_is_refused_before_it_becomes_a_large_table(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'MAX_CELLS', 53*100)
    (tmp_path/'a.csv').write_bytes(CSV+b'1\n'*100)
    with pytest.raises(DataError, match='a.csv: 131 lines of 53 columns, .* refused without `allow_large`'): read_bulldozers(tmp_path/'a.csv')
    (tmp_path/'a.csv').write_bytes((CSV+b'1\n'*100).replace(b'\n', b'\r'))
    with pytest.raises(DataError, match='refused without `allow_large`'): read_bulldozers(tmp_path/'a.csv')

def test_an_honest_archive_passes_at_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'MIN_BYTES', 0)
    (tmp_path/'a.zip').write_bytes(zipped(('Train.csv', CSV)))
    assert len(read_bulldozers(tmp_path/'a.zip')) == 30

@pytest.mark.parametrize('allow', ['', '--allow-large'])
def test_the_command_has_the_flag(allow, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, 'MAX_BYTES', 100)
    (tmp_path/'a.zip').write_bytes(zipped(('Train.csv', CSV)))
    status = dropconnect_bulldozers(['--data', str(tmp_path/'a.zip'), '--models', 'extra-trees', '--seeds', '1', '--out', str(tmp_path/'out'), *allow.split()])
    last = capsys.readouterr().err.splitlines()[-1]
    assert status == (0 if allow else 2) and (tmp_path/'out').exists() == bool(allow)
    if not allow: assert last.endswith('refused without `allow_large`')


# --- archives that are not what they seem

@pytest.mark.parametrize('method', [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_cannot_be_unpacked_in_small_steps_are_refused(method, tmp_path):
    (tmp_path/'a.zip').write_bytes(zipped(('Train.csv', CSV), method=method))
    with pytest.raises(DataError, match='a.zip: Train.csv in it is neither stored nor deflated; pack it anew'): read_bulldozers(tmp_path/'a.zip')

def test_a_zip_in_a_zip_is_not_opened(tmp_path):
    inner = zipped(('Train.csv', CSV))
    (tmp_path/'a.zip').write_bytes(zipped(('inner.zip', inner)))
    with pytest.raises(DataError, match='nor one single other CSV; it holds inner.zip'): read_bulldozers(tmp_path/'a.zip')
    (tmp_path/'b.zip').write_bytes(zipped(('Train.csv', inner)))
    with pytest.raises(DataError, match='b.zip:Train.csv: not a CSV file'): read_bulldozers(tmp_path/'b.zip')

def test_a_directory_of_many_members_is_not_read(tmp_path):
    buffer = io.BytesIO(zipped(('Train.csv', CSV)))
    with zipfile.ZipFile(buffer, 'a') as z:
        for i in range(1500): z.writestr(f'{i:05}'.ljust(60_000, 'x'), b'')
    (tmp_path/'a.zip').write_bytes(buffer.getvalue())
    assert peak_of_refusing(tmp_path/'a.zip', 'lists too many files') < 4*2**20

def test_few_members_of_many_are_named(tmp_path):
    (tmp_path/'a.zip').write_bytes(zipped(*((f'{i}.txt', b'') for i in range(2000))))
    with pytest.raises(DataError, match='it holds 0.txt, 1.txt, 2.txt, 3.txt, 4.txt$'): read_bulldozers(tmp_path/'a.zip')

def test_members_that_share_their_bytes_unpack_once(tmp_path):
    "Overlapping members multiply an archive that is unpacked as a whole; only one is ever read"
    data = zipped(('Train.csv', CSV))
    at = data.rindex(b'PK\1\2')
    directory,end = data[at:data.rindex(b'PK\5\6')],data[data.rindex(b'PK\5\6'):]
    end = end[:8] + struct.pack('<HHI', 3, 3, 3*len(directory)) + end[16:]
    copies = [directory, directory.replace(b'Train.csv', b'Other.csv'), directory.replace(b'Train.csv', b'Third.csv')]
    (tmp_path/'a.zip').write_bytes(data[:at]+b''.join(copies)+end)
    assert len(read_bulldozers(tmp_path/'a.zip')) == 30

def test_an_encrypted_archive(tmp_path):
    data = bytearray(zipped(('Train.csv', CSV)))
    data[6] |= 1; data[data.rindex(b'PK\1\2')+8] |= 1
    (tmp_path/'a.zip').write_bytes(data)
    with pytest.raises(DataError, match='not a zip archive that can be read.*encrypted'): read_bulldozers(tmp_path/'a.zip')


# --- what is no file

@pytest.mark.skipif(os.name=='nt', reason='Windows has no such files')
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path/'a.csv')
    with pytest.raises(DataError, match='a.csv: is not a regular file'): read_bulldozers(tmp_path/'a.csv')

def test_a_nul_in_the_path():
    with pytest.raises(DataError, match='no such file'): read_bulldozers('a\0b')
