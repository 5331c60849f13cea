// node pyodide.mjs TREE SITE FOLDER TEST...: Python 3.14, as WebAssembly, imports the module and runs tests.
// FOLDER holds node_modules/pyodide, SITE pure Python packages for the tests.
process.on("uncaughtException", (error) => {
  console.error(String(error.stack ?? error).slice(-4000));
  process.exit(1);
});
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [tree, site, folder, ...tests] = process.argv.slice(2);
const found = createRequire(join(folder, "here.js")).resolve("pyodide/pyodide.mjs");
const { loadPyodide } = await import(pathToFileURL(found).href);
const python = await loadPyodide({ env: { HOME: "/home", PYTHONDONTWRITEBYTECODE: "1" } });
python.mountNodeFS("/tree", tree);
python.mountNodeFS("/site", site);
python.FS.mkdirTree("/home");
python.globals.set("tests", python.toPy(tests));
const status = await python.runPythonAsync(`
import os, sys, warnings

warnings.simplefilter("error")
sys.path[:0] = ["/tree", "/tree/.ci"]
os.chdir("/tree")
import copilot_router
from copilot_router import FailoverChain, ProviderTier, ScriptedProvider, ServerError

chain = FailoverChain([
    ProviderTier("down", ScriptedProvider([ServerError("down")] * 2), ["a"]),
    ProviderTier("up", ScriptedProvider(["answered"]), ["b"]),
], sleep=lambda seconds: None)
said = chain.chat("hi").explain()
warnings.simplefilter("default")
sys.path.insert(0, "/site")
import pytest, without_sockets

plugin = without_sockets.Plugin()
options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:faulthandler",
           "-p", "no:unraisableexception", "--tb=short"]
status = pytest.main([*options, *tests], plugins=[plugin])
if status == 0:
    print(f"Python {sys.version.split()[0]}: {said}; {plugin.passed} tests passed, {plugin.skipped} "
          "need sockets, threads, processes or a package that is not there")
int(status)
`);
process.exit(status);
