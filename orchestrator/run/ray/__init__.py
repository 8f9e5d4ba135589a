"""The same on a Ray cluster: Tune drives the trials, the coordinator grants devices, Train runs the gangs.

Interfaces of Ray 2.60 that this room uses though they are private, each because there is no public way:

    ray._private.ray_constants             a Ray of one machine that listens on loopback only (cluster)
    ray._private.runtime_env.constants     which variables a submitted job has set: Ray takes these from nobody else (cluster)
    ray._private.services                  the address of the head that is named, without joining it (cluster)
    ray.train.torch.config                 ranks that meet by a file, where torch's server would listen everywhere (rendezvous)
    ray.tune.execution.class_cache         Tune would copy secrets into runtime environments, which Ray logs (sweep)
"""
