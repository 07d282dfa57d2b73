//! `kiln prune` (edge).

use kiln_agent::error::chain;
use kiln_agent::housekeeping::{self, Pruned};

use crate::app::Exit;
use crate::args::PruneArgs;
use crate::{paths, terminal};

/// Runs the command.
pub(crate) fn run(args: &PruneArgs) -> Result<u8, Exit> {
    let config = paths::load_config(&args.places)?.agent;
    let agent = paths::open_agent(config, &paths::data_dir(&args.places)?)?;
    let runtime = paths::runtime()?;
    let failed = |e| Exit::system(chain(&e));
    let reclaimed = runtime.block_on(housekeeping::reclaim(&agent)).map_err(failed)?;
    let pruned = runtime.block_on(housekeeping::prune(&agent, args.all)).map_err(failed)?;
    report(reclaimed, &pruned);
    Ok(0)
}

fn report(reclaimed: usize, pruned: &Pruned) {
    terminal::out(&format!("deleted {reclaimed} jobs of killed builds"));
    terminal::out(&format!("deleted {} base images and {} bytes of blobs", pruned.bases, pruned.blob_bytes));
    terminal::out(&format!(
        "deleted {} generations of cache mounts, {} of layers, and {} logs",
        pruned.cache_generations, pruned.layer_generations, pruned.logs
    ));
}
