"All public names of the package: `from fastai_dropconnect.all import *`, after `from fastai.tabular.all import *`"
from fastai_dropconnect.masks import *
from fastai_dropconnect.functional import *
from fastai_dropconnect.layers import *
from fastai_dropconnect.ensemble import *
from fastai_dropconnect.tabular.core import *
from fastai_dropconnect.tabular.embeddings import *
from fastai_dropconnect.tabular.model import *
from fastai_dropconnect.tabular.learner import *
from fastai_dropconnect.callback.batchnorm import *
from fastai_dropconnect.callback.core import *
from fastai_dropconnect.callback.frozen_zero import *
from fastai_dropconnect.callback.dropconnect import *
from fastai_dropconnect.callback.zero_restarts import *
from fastai_dropconnect.recipes import *
from fastai_dropconnect.bulldozers import *
from fastai_dropconnect.cli import *
