"A pytest plugin: Learners train on a device with memory of its own, as on a GPU, but simulated on the CPU"
import os, subprocess, types
from contextlib import nullcontext
from pathlib import Path
import torch, torch.utils.cpp_extension as cpp

NAME = 'simulated'

def compile_to(
    folder:Path # Where the library goes
) -> Path: # The library
    "Compile the device, unless it is there"
    library,source = folder/'simulated_device.so',Path(__file__).with_suffix('.cpp')
    if library.exists(): return library
    part = library.with_suffix(f'.{os.getpid()}')
    torch_paths = [*(f'-isystem{p}' for p in cpp.include_paths()), *(f'-L{p}' for p in cpp.library_paths())]
    flags = ['-std=c++20','-O0','-w','-shared','-fPIC',f'-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}']
    subprocess.run(['g++',*flags,str(source),'-o',str(part),*torch_paths,'-ltorch_cpu','-lc10'], check=True)
    return part.rename(library)

def _module():
    "Make what torch looks for in `torch.simulated`"
    res = types.ModuleType(f'torch.{NAME}')
    res.is_available = res.is_initialized = lambda: True
    res.device_count,res.current_device = lambda: 1,lambda: 0
    res.manual_seed = res.manual_seed_all = res.set_device = lambda *args: None
    res.device,res._is_in_bad_fork = nullcontext,lambda: False
    res.get_rng_state,res.set_rng_state = lambda device=0: torch.get_rng_state(),lambda state, device=0: torch.set_rng_state(state)
    res.get_amp_supported_dtype = lambda: [torch.bfloat16,torch.float16]
    return res

def register(library:Path):
    "Load the device into this process, and make it the default of Learners"
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.__future__.set_swap_module_params_on_conversion(True)      # `to` keeps the parameters, as with a GPU
    import fastai.torch_core as fc
    fc.default_device.__code__ = (lambda use=-1: torch.device('simulated')).__code__

if 'SIMULATED_DEVICE' in os.environ: register(Path(os.environ['SIMULATED_DEVICE']))
