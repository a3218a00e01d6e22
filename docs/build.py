"Renders the notebooks to a static site that needs no network: `python docs/build.py [--out FOLDER]`"
import ast, html, inspect, os, re, shutil, sys
from importlib import import_module
from operator import attrgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

try:
    import smalldocs.site, yaml
    from latex2mathml.converter import convert
except ImportError as e: sys.exit(f'The docs need Python 3.11 and the development packages of settings.ini: {e}')
from fastcore.basics import AttrDict, listify
from fastcore.nbio import mk_cell, read_nb, write_nb
from fastcore.script import call_parse
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, _default_exp, _show_docs, _want_doc, add_show_docs, exec_show_docs
from nbdev.showdoc import show_doc, showdoc_nm

# By the first digit of a notebook's number
FLOORS = ['Ground: checks, masks, helpers', 'Kernels and functions', 'Layers, sparsity, ensembles',
          'Tables, callbacks, optimizers', 'Recipes', 'Estimators and the auction example', 'Command and public names']
PICTURES = ('.png','.svg','.jpg','.gif')


# From a notebook to what its page shows

def lib(module=None):
    "Import the package's module that a notebook exports to, or the one with all names"
    return import_module(f'{get_config().lib_path.name}.{module or "all"}')

def assigned(tree):
    "List the names that a statement assigns"
    targets = tree.targets if isinstance(tree, ast.Assign) else [tree.target] if isinstance(tree, ast.AnnAssign) else []
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]

def defined(tree):
    "Name the public function, class or documented patch that a statement defines"
    if not isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or tree.name[0]=='_': return []
    names = listify(showdoc_nm(tree))
    return [n for n in names if '.' not in n or ast.get_docstring(tree)]

def constant_cell(code, names):
    "Make a cell with a heading for each constant and the code that assigns them"
    headings = [f'### {n} {{#{n}}}' for n in names]
    return mk_cell('\n\n'.join(['---', *headings, f'```python\n{code}\n```']), 'markdown')


class document_exports(Processor):
    "Add the docs of public names below the cell that exports them, in its order"
    def begin(self):
        cells = self.nb.cells
        self.public = getattr(lib(self.nb.module_), '__all__', []) if self.nb.module_ else []
        self.shown = {ast.unparse(t.value.args[0]) for c in cells for t in _show_docs(c.parsed_() or [])}
        for cell in [c for c in cells if _want_doc(c)]:
            at = cells.index(cell) + 1
            cells[at:at] = [doc for tree in cell.parsed_() or [] for doc in self.docs(cell, tree)]

    def docs(self, cell, tree):
        "Make the cells for what a statement of an exported cell defines"
        constants = [n for n in assigned(tree) if n in self.public]
        self.nb.names_ |= {n: n for n in constants}
        code = cell.source.splitlines()[tree.lineno-1:tree.end_lineno]
        if constants: yield constant_cell('\n'.join(code), constants)
        for name in defined(tree):
            if name not in self.shown: yield mk_cell(f'show_doc({name})')

class fill_show_docs(Processor):
    "Fill the `show_doc` cells from the exported module, without running the notebook"
    def begin(self): self.module = vars(lib(self.nb.module_))

    def doc(self, tree):
        "Show signature and docstring of what a call of `show_doc` names"
        doc = show_doc(eval(ast.unparse(tree.value.args[0]), self.module))
        self.nb.names_[doc.nm] = doc.nm.lower()
        return AttrDict(output_type='display_data', metadata={}, data={'text/markdown': doc._repr_markdown_()})

    def cell(self, cell):
        calls = _show_docs(cell.parsed_() or [])
        if calls: cell.outputs = [self.doc(t) for t in calls]

class Filter(FilterDefaults):
    "nbdev's processors, but for the two above"
    def base_procs(self):
        own = {add_show_docs: document_exports, exec_show_docs: fill_show_docs}
        return [own.get(p, p) for p in super().base_procs()]


# The pages of the site

def markdowns(nb):
    "List where Markdown stands in a notebook: each key and its container"
    cells = [('source', c) for c in nb.cells if c.cell_type=='markdown']
    data = [o['data'] for c in nb.cells for o in c.get('outputs', []) if 'data' in o]
    return cells + [('text/markdown', d) for d in data if 'text/markdown' in d]

def read_page(path):
    "Read a notebook into its processed form, with its name, title, floor and module"
    nb = read_nb(path)
    nb.module_ = _default_exp(nb)        # the processors take directives away
    nb.names_ = {}                       # they note here the anchor of each name that has docs
    Filter()(nb)
    fm = nb.frontmatter_
    nb.cells[0].source = f'---\n{yaml.safe_dump({k: fm[k] for k in ("title","description") if k in fm})}---\n'
    floor = int(path.name[0]) if path.name[0].isdigit() else None
    return AttrDict(path=path, nb=nb, module=nb.module_, names=nb.names_, floor=floor,
                    name=Path(fm['output-file']).stem, title=fm['title'].replace('`', ''))

# Pages without a floor, in the order in which a new user reads them; others follow by name
FIRST = ['index', *(f'tutorial.{n}' for n in 'estimators choosing bulldozers uncertainty small speed serving engine'.split())]

def place(page):
    "Return what pages are sorted by"
    is_first = page.name in FIRST
    return (-1 if page.floor is None else page.floor, FIRST.index(page.name) if is_first else len(FIRST), page.path.name)

def read_pages(nbs):
    "Read all notebooks of a folder in the order of the site"
    return sorted([read_page(p) for p in Path(nbs).glob('*.ipynb')], key=place)

def repo_url(path):
    "Make the address of a file in the repository"
    cfg = get_config()
    return f'{cfg.git_url}/blob/{cfg.branch}/{path.resolve().relative_to(ROOT)}'

def name_link(text, page, pages):
    "Link a name to its docs on this page, or on the only one that has them"
    name = text.strip('`')
    homes = [p for p in pages if name in p.names]
    if len(homes)>1: homes = [p for p in homes if p is page]
    return f'[{text}]({homes[0].name}.ipynb#{homes[0].names[name]})' if homes else text

def link(text, href, page, pages):
    "Make a link that holds in the site, to a page, a name, or the repository"
    path,mark,anchor = href.partition('#')
    if path.startswith('/') and anchor: return name_link(text, page, pages)      # nbdev's, from a name in backticks
    to = next((p for p in pages if p.path.name==Path(path).name), None)
    if to: return f'[{to.title if text==to.path.stem else text}]({to.name}.ipynb{mark}{anchor})'
    file = next((f for f in (page.path.parent/path, ROOT/path) if path and f.exists()), None)
    return f'[{text}]({repo_url(file)}{mark}{anchor})' if file else f'[{text}]({href})'

def relink(markdown, page, pages):
    "Rewrite the links in Markdown"
    return re.sub(r'(?<!!)\[([^\[\]]*)\]\(([^()\s:]+)\)', lambda m: link(*m.groups(), page, pages), markdown)

def origin(page):
    "Tell in one line which module and which notebook a page comes from"
    notebook = f'[{page.path.name}]({repo_url(page.path)})'
    if not page.module: return f'Notebook: {notebook}'
    module = lib(page.module)
    return f'Module: [`{module.__name__}`]({repo_url(Path(module.__file__))}), from the notebook {notebook}'

def write_page(page, pages, folder):
    "Write a processed notebook under its page's name"
    for key,o in markdowns(page.nb): o[key] = relink(''.join(o[key]), page, pages)
    page.nb.cells.insert(1, mk_cell(f'::: {{.origin}}\n{origin(page)}\n:::', 'markdown'))
    write_nb(page.nb, folder/f'{page.name}.ipynb')


# The index of public names

def summary(module, name):
    "Take the first line of a docstring, or the comment or value of a constant"
    o = attrgetter(name)(module)
    if callable(o): return (inspect.getdoc(o) or '').partition('\n')[0]
    comment = re.search(rf'^{name}\s*=.*?\s#\s+(.*)$', inspect.getsource(module), re.M)
    return comment[1] if comment else f'`{o!r}`' if len(repr(o))<80 else f'A {type(o).__name__}'

def is_patch(module, name):
    "Tell whether a name is a method for a class of another package"
    owner,_,method = name.partition('.')
    return method and not getattr(module, owner).__module__.startswith(get_config().lib_path.name)

def public_names(pages):
    "Find the public names that each page has docs of"
    left = set(lib().__all__)
    for page in [p for p in pages if p.module]:
        module = lib(page.module)
        names = [n for n in module.__all__ if n in left and n in page.names]
        left -= {*names}
        yield page,module,names + [n for n in page.names if is_patch(module, n)]
    if left: sys.exit(f'No page has docs of these public names: {", ".join(sorted(left))}')

def row(page, module, name):
    "Make the line of a name"
    text = summary(module, name).replace('|', r'\|')
    return f'| [`{name}`]({page.name}.ipynb#{page.names[name]}) | {text} | [{page.title}]({page.name}.ipynb) |'

def table(title, rows):
    "Make a section with a table"
    head = [f'## {title}\n\n::: {{.names}}', '| name | what it does | page |', '|---|---|---|']
    return '\n'.join([*head, *rows, ':::'])

def index_of_names(pages):
    "List all public names by floor, in the order of the pages"
    rows = {}
    for page,module,names in public_names(pages):
        rows.setdefault(page.floor, []).extend(row(page, module, n) for n in names)
    return '\n\n'.join(table(FLOORS[floor], r) for floor,r in rows.items() if r)

def is_index(page):
    "Tell whether a page is that of the module with all names"
    return page.module=='all'


# The site

OFFLINE_SEARCH = """<script>
// A page opened from a folder may not fetch, but may load a script: there the search index comes as one
if (location.protocol == 'file:') window.fetch = () => new Promise(done => {
  const script = document.createElement('script')
  script.src = 'search.js'
  script.onload = () => done({json: () => window.searchIndex})
  document.head.append(script)
})
</script>"""

def sections(pages):
    "Lay out the sidebar: how to use the package and its names first, then floor by floor"
    def entries(test): return [dict(text=p.title, href=f'{p.name}.ipynb') for p in pages if test(p)]
    use = entries(lambda p: p.floor is None) + entries(is_index)
    floors = [(t, entries(lambda p: p.floor==i and not is_index(p))) for i,t in enumerate(FLOORS)]
    return [dict(section=t, contents=c) for t,c in [('Use it', use), *floors] if c]

def options(pages, out):
    "Make the options of smalldocs"
    cfg = get_config()
    sidebar = {'style': 'docked', 'search': True, 'collapse-level': 2, 'contents': sections(pages)}
    site = {'title': cfg.title, 'description': cfg.description, 'repo-url': cfg.git_url, 'favicon': 'favicon.svg'}
    site |= {'page-navigation': True, 'sidebar': sidebar}
    page = {'theme': 'default', 'css': 'style.css', 'toc': True, 'toc-depth': 3}      # other themes load fonts
    page |= {'include-in-header': {'text': OFFLINE_SEARCH}}
    return {'project': {'type': 'website', 'output-dir': str(out)}, 'website': site, **page}

MATH = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
KATEX = re.compile(r'<(?:link|script)\b[^>]*/katex@[^>]*>(?:</script>)?')

def mathml(m):
    "Turn a formula into MathML, which browsers show by themselves"
    return convert(html.unescape(m[2]), display='block' if m[1]=='display' else 'inline')

RAW = re.compile(r'"https://raw\.githubusercontent\.com/(?:[^"/]+/){3}([^"]+)"')

def local_picture(m, out):
    "Copy a picture of the repository into the site, and name the copy"
    shutil.copy(ROOT/m[1], out)
    return f'"{Path(m[1]).name}"'

def finish(out):
    "Make a rendered site independent of the network"
    for file in out.glob('*.html'):
        text = RAW.sub(lambda m: local_picture(m, out), file.read_text())
        text = MATH.sub(mathml, text)
        text = KATEX.sub('', text)
        file.write_text(text.replace('href="./"', 'href="index.html"'))      # a folder on disk has no page of its own
    (out/'search.js').write_text(f'window.searchIndex = {(out/"search.json").read_text()}')

@call_parse
def main(
    out:str='_docs', # Folder of the site, emptied first
    proc:str='_proc' # Folder of what the site is made from, emptied first
):
    "Render all notebooks to a static site"
    out,proc = Path(out).resolve(),Path(proc).resolve()
    os.chdir(ROOT)
    shutil.rmtree(proc, ignore_errors=True)
    proc.mkdir(parents=True)
    nbs = get_config().nbs_path
    pages = read_pages(nbs)
    for page in pages:
        if is_index(page): page.nb.cells[1:] = [mk_cell(index_of_names(pages), 'markdown')]
        write_page(page, pages, proc)
    for file in [*(ROOT/'docs').iterdir(), *nbs.iterdir()]:
        if file.suffix in ('.css', *PICTURES): shutil.copy(file, proc)
    (proc/'_smalldocs.yml').write_text(yaml.safe_dump(options(pages, out), sort_keys=False, allow_unicode=True))
    site = smalldocs.site.build(proc, quiet=True)
    if site.warnings: sys.exit('\n'.join(site.warnings))
    finish(out)
    print(f'{len(site.pages)} pages in {out}')
