// How hot the phone is, and what is still computed then.
package crayon.app

import android.annotation.TargetApi
import android.os.Build
import android.os.PowerManager
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow

/**
 * How much may be computed for one answer.
 *
 * @property maxNewTokens 0: nothing is.
 * @property turns of the conversation that the model is given, the question included: a longer prompt takes longer to read.
 */
data class Limits(val maxNewTokens: Int, val turns: Int)

/** Our choice: half at the first sign that the system slows down (moderate), little at the next, nothing where apps are about to be ended. */
fun limits(thermalStatus: Int): Limits =
    when {
        thermalStatus < PowerManager.THERMAL_STATUS_MODERATE -> Limits(256, 8)
        thermalStatus < PowerManager.THERMAL_STATUS_SEVERE -> Limits(128, 4)
        thermalStatus < PowerManager.THERMAL_STATUS_CRITICAL -> Limits(48, 1)
        else -> Limits(0, 0)
    }

/** Follows the thermal status of the phone. Before API 29 there is none, and it counts as cool. */
class Thermometer(power: PowerManager) {
    private val told = MutableStateFlow(limits(0))

    /** What may be computed now. */
    val limits: StateFlow<Limits> = told.asStateFlow()

    init {
        if (Build.VERSION.SDK_INT >= Build.VERSION_CODES.Q) follow(power)
    }

    @TargetApi(Build.VERSION_CODES.Q)
    private fun follow(power: PowerManager) {
        told.value = limits(power.currentThermalStatus)
        power.addThermalStatusListener { told.value = limits(it) }
    }
}
