"The site of the docs is whole, its links hold, and a browser can read and search it without a network"
import ast, contextlib, functools, http.server, importlib.util, json, re, shutil, socket
import subprocess, sys, threading, time, urllib.error, urllib.request
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
import pytest

ROOT = Path(__file__).parent.parent
missing = [m for m in ('smalldocs','latex2mathml') if not importlib.util.find_spec(m)]
pytestmark = pytest.mark.skipif(bool(missing), reason=f'not installed: {", ".join(missing)} (for Python 3.11 or newer)')


class Html(HTMLParser):
    "Anchors of a page, headings by anchor, references `(tag, address)`, and links with their text"
    def __init__(self, path):
        super().__init__()
        self.ids,self.refs,self.links,self.headings,self._open,self._heading = [],[],[],{},None,None
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get('id'): self.ids.append(attrs['id'])
        if attrs.get('href') is not None and tag=='a': self.links.append([attrs['href'],''])
        if tag=='a': self._open = attrs.get('href')
        if re.fullmatch(r'h[1-6]', tag): self._heading = attrs.get('data-anchor-id')
        address = attrs.get('src') or (attrs.get('href') if tag in ('a','link') else None)
        if address: self.refs.append((tag, address))

    def handle_endtag(self, tag):
        if tag=='a': self._open = None
        if re.fullmatch(r'h[1-6]', tag): self._heading = None

    def handle_data(self, data):
        if self._open is not None: self.links[-1][1] += data
        if self._heading: self.headings[self._heading] = self.headings.get(self._heading, '') + data


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of a site made from all notebooks"
    tmp = tmp_path_factory.mktemp('docs')
    command = [sys.executable, ROOT/'docs'/'build.py', '--out', tmp/'site', '--proc', tmp/'proc']
    res = subprocess.run(command, capture_output=True, text=True)
    assert res.returncode==0, res.stdout+res.stderr
    return tmp/'site'

@pytest.fixture(scope='module')
def pages(site): return {p.name: Html(p) for p in site.glob('*.html')}


def dead(site, pages):
    "References to what is not there"
    for name,page in pages.items():
        for tag,address in page.refs:
            if re.match(r'https?:', address) and tag=='a' or address.startswith('data:image/'): continue
            path,_,anchor = unquote(address).partition('#')
            path = path.partition('?')[0] or name
            if ':' in path or not (site/path).is_file(): yield name,tag,address
            elif anchor and path in pages and anchor not in pages[path].ids: yield name,tag,address

def test_no_link_is_dead_and_nothing_is_loaded_from_elsewhere(site, pages):
    assert len(pages)>10 and any(tag=='img' for p in pages.values() for tag,_ in p.refs)
    names = {a for n,p in pages.items() for tag,a in p.refs if n!='all.html' and '.html#' in a}
    assert len(names)>10, 'names in backticks have no links'
    assert list(dead(site, pages))==[]
    for css in site.rglob('*.css'):
        for address in re.findall(r'''(?:url\(\s*|@import\s+)["']?([^"')\s;]+)''', css.read_text()):
            file = css.parent/re.split('[?#]', address)[0]
            assert address.startswith('data:') or file.is_file(), f'{css.name}: {address}'

def test_every_anchor_stands_once(pages):
    for name,page in pages.items(): assert sorted(set(page.ids))==sorted(page.ids), name

def test_formulas_need_no_script(site):
    text = ''.join(p.read_text() for p in site.glob('*.html'))
    cells = [c for nb in (ROOT/'nbs').glob('*.ipynb') for c in json.loads(nb.read_text())['cells']]
    formulas = [c for c in cells if c['cell_type']=='markdown' and '$$' in ''.join(c['source'])]
    assert text.count('<math')>=len(formulas)>0 and 'class="math' not in text and 'katex' not in text.lower()

def test_every_notebook_has_its_page_in_the_sidebar(pages):
    from nbdev.config import nbpath2html
    sidebar = [href for href,_ in pages['index.html'].links]
    for nb in (ROOT/'nbs').glob('*.ipynb'):
        name = nbpath2html(nb).name
        assert name in pages and (name in sidebar or f'./{name}' in sidebar), nb.name

def test_the_sidebar_goes_from_use_to_the_floors(site):
    titles = re.findall(r'class="menu-text">([^<]*)<', (site/'index.html').read_text())
    assert titles[0]=='Use it' and any(t.startswith('Ground') for t in titles)
    floors = [titles.index(t) for t in floor_titles() if t in titles]
    assert floors==sorted(floors) and len(floors)==len({p.name[0] for p in (ROOT/'nbs').glob('[0-9]*.ipynb')})

def floor_titles():
    tree = ast.parse((ROOT/'docs'/'build.py').read_text())
    return next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id=='FLOORS')

def test_the_tutorials_stand_in_reading_order(site):
    text = (site/'index.html').read_text()
    names = list(dict.fromkeys(re.findall(r'href="(?:\./)?(tutorial\.\w+)\.html" class="sidebar-item-text', text)))
    assert names[0]=='tutorial.estimators' and names[-1]=='tutorial.engine'
    assert sorted(names)==sorted(p.stem for p in (ROOT/'nbs').glob('tutorial.*.ipynb'))

def test_the_index_has_every_public_name(pages):
    import fastai_dropconnect.all as every
    links = {text.strip(): href for href,text in pages['all.html'].links}
    assert len(every.__all__)>20
    for name in [*every.__all__, 'Learner.fit_zero_restarts']:
        page,_,anchor = links[name].partition('#')
        page = pages[page.removeprefix('./')]
        assert anchor in page.ids and page.headings[anchor].strip()==name

def test_the_search_index_has_the_names(site, pages):
    entries = json.loads((site/'search.json').read_text())
    assert any(e['section']=='DropConnect' and e['href'].endswith('#dropconnect') for e in entries)
    assert {e['href'].partition('#')[0] for e in entries}==set(pages)
    assert json.loads((site/'search.js').read_text().removeprefix('window.searchIndex = '))==entries


# In a browser

def wait_for(f, seconds=30):
    "What `f` returns as soon as that is something"
    end = time.time()+seconds
    while time.time()<end:
        with contextlib.suppress(ConnectionError):
            if (res := f()): return res
        time.sleep(.1)

class Browser:
    "Chromium, by the protocol of its driver"
    def __init__(self, driver):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen([driver, f'--port={self.port}'], **quiet)
        self.session = ''

    def start(self, chromium, profile):
        "Open a window with an empty profile"
        args = ['headless','no-sandbox','disable-gpu','disable-background-networking','disable-component-update',
                'disable-sync','no-first-run',f'user-data-dir={profile}','window-size=1400,1000']
        caps = {'goog:chromeOptions': {'binary': chromium, 'args': args},
                'goog:loggingPrefs': {'browser': 'ALL', 'performance': 'ALL'}}
        wait_for(lambda: socket.create_connection(('127.0.0.1', self.port), 1).close() or True)
        self.session = self('session', capabilities={'alwaysMatch': caps})['sessionId']

    def __call__(self, path, **data):
        url = f'http://127.0.0.1:{self.port}/' + (f'session/{self.session}/{path}' if self.session else path)
        req = urllib.request.Request(url, json.dumps(data).encode(), {'Content-Type': 'application/json'})
        try:
            with urllib.request.urlopen(req, timeout=60) as r: return json.loads(r.read())['value']
        except urllib.error.HTTPError as e: raise RuntimeError(json.loads(e.read())['value']['message']) from None

    def open(self, url): return self('url', url=url)
    def js(self, script): return self('execute/sync', script=script, args=[])
    def log(self, type): return self('se/log', type=type)
    def errors(self): return [e['message'] for e in self.log('browser') if e['level'] in ('SEVERE','WARNING')]

    def requests(self):
        "The addresses that pages have asked for"
        messages = [json.loads(e['message'])['message'] for e in self.log('performance')]
        return [m['params']['request']['url'] for m in messages if m['method']=='Network.requestWillBeSent']

    def search(self, text):
        "Type into the search box and wait for the results: title, section and address of each"
        self.js(f'''const box = document.querySelector('.smalldocs-search input')
            box.value = {text!r}
            box.dispatchEvent(new Event('input'))''')
        script = '''const text = (a, part) => a.querySelector(`.search-result-${part}`)?.textContent
            const results = [...document.querySelectorAll('.search-result')]
            return results.map(a => [text(a, 'title'), text(a, 'section'), a.getAttribute('href')])'''
        return wait_for(lambda: self.js(script))

    def close(self):
        quit = urllib.request.Request(f'http://127.0.0.1:{self.port}/session/{self.session}', method='DELETE')
        if self.session: urllib.request.urlopen(quit, timeout=10).close()
        self.process.terminate()
        self.process.wait(10)


def installed(*names): return next((p for n in names if (p := shutil.which(n))), None)

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    chromium,driver = installed('google-chrome','chromium','chromium-browser'),installed('chromedriver')
    if not chromium: pytest.skip('Chromium is not installed')
    if not driver: pytest.skip('chromedriver, which tells Chromium what to do, is not installed')
    b = Browser(driver)
    try:
        b.start(chromium, tmp_path_factory.mktemp('profile'))
        yield b
    finally: b.close()

@pytest.fixture(scope='module')
def address(site):
    "The site on a server"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_a_browser_loads_every_page_without_an_error(browser, address, pages):
    for name in pages:
        browser.open(f'{address}/{name}')
        assert browser.errors()==[], name
        assert browser.js("return document.querySelector('main h1').textContent"), name
        assert browser.js('return [...document.images].every(i => i.naturalWidth)'), f'{name}: a picture is broken'
    asked = browser.requests()
    assert len(asked)>=len(pages) and [u for u in asked if not u.startswith((address,'data:','chrome:'))]==[]

@pytest.mark.parametrize('where', ['server','folder'])
def test_a_browser_finds_dropconnect(browser, address, site, where):
    browser.open(f'{address}/index.html' if where=='server' else (site/'index.html').as_uri())
    found = browser.search('DropConnect')
    assert found and any(section=='DropConnect' and href.endswith('#dropconnect') for _,section,href in found)
    assert browser.errors()==[]
