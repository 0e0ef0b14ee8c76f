/*
 * From a call to what an app of the phone is asked to do, as an intent. Nothing is started here.
 *
 * Each of these intents opens another app with its fields filled in; what is sent or paid there, the user sends or pays there.
 */
package crayon.app.calls

import android.app.SearchManager
import android.content.Context
import android.content.Intent
import android.net.Uri
import android.provider.AlarmClock
import android.provider.CalendarContract
import android.provider.MediaStore
import crayon.app.R
import java.time.DayOfWeek
import java.time.LocalDate
import java.time.LocalDateTime
import java.time.LocalTime
import java.time.ZoneId
import java.time.format.DateTimeFormatter
import java.time.format.FormatStyle
import java.time.format.TextStyle
import java.time.temporal.TemporalAdjusters
import java.util.Locale

/**
 * What a phone can be asked to do.
 *
 * @property text of what it is, with places for `fields`.
 * @property intents of which the first is started that some app answers.
 */
class PhoneAction(private val text: Int, private val fields: List<String>, val intents: List<Intent>) {
    /** What will happen, in a sentence. */
    fun title(context: Context): String = context.getString(text, *fields.toTypedArray())
}

/** What a call asks for; null: a value of it cannot be understood, so it stays a text. @param now on this phone's clock. */
fun action(call: Call, now: LocalDateTime): PhoneAction? {
    val given = call.arguments
    return when (call.function) {
        "alarm.set" -> alarm(given.getValue("time"), given.getValue("day"), now)
        "timer.start" -> timer(given.getValue("n"), given.getValue("unit"))
        "message.send" -> message(given.getValue("to"), given.getValue("body"))
        "music.play" -> music(given.getValue("genre"), given.getValue("room"))
        "nav.route" -> route(given.getValue("to"), given.getValue("by"))
        "calendar.add" -> event(given.getValue("what"), given.getValue("who"), given.getValue("day"), given.getValue("time"), now)
        else -> null
    }
}

private val NOON_CLOCK = Regex("(1[0-2]|[1-9]):([0-5][0-9]) (AM|PM)")
private val DAY_CLOCK = Regex("([01][0-9]|2[0-3]):([0-5][0-9])")
private val NUMBER = Regex("[1-9][0-9]{0,4}")
private val PHONE_NUMBER = Regex("[+]?[0-9]{3,15}")
private const val LONGEST_TIMER = 86_400 // what AlarmClock.EXTRA_LENGTH takes

/** `7:30 AM` or `19:30`. */
internal fun time(text: String): LocalTime? {
    NOON_CLOCK.matchEntire(text)?.destructured?.let { (hour, minute, half) ->
        return LocalTime.of(hour.toInt() % 12 + if (half == "PM") 12 else 0, minute.toInt())
    }
    return DAY_CLOCK.matchEntire(text)?.destructured?.let { (hour, minute) -> LocalTime.of(hour.toInt(), minute.toInt()) }
}

/** `today`, `tomorrow`, or the next day of that name that is not today. */
internal fun date(text: String, today: LocalDate): LocalDate? =
    when (text) {
        "today" -> today
        "tomorrow" -> today.plusDays(1)
        else -> DayOfWeek.entries.find { it.name.lowercase() == text }?.let { today.with(TemporalAdjusters.next(it)) }
    }

private fun alarm(timeText: String, dayText: String, now: LocalDateTime): PhoneAction? {
    val time = time(timeText) ?: return null
    val date = date(dayText, now.toLocalDate()) ?: return null
    val at = date.atTime(time)
    if (at <= now) return null
    val intent = Intent(AlarmClock.ACTION_SET_ALARM)
        .putExtra(AlarmClock.EXTRA_HOUR, time.hour)
        .putExtra(AlarmClock.EXTRA_MINUTES, time.minute)
        .putExtra(AlarmClock.EXTRA_SKIP_UI, false)
    val shown = FormatStyle.SHORT.let(DateTimeFormatter::ofLocalizedTime).format(time)
    if (at <= now.plusDays(1)) return PhoneAction(R.string.act_alarm, listOf(shown, day(date.dayOfWeek)), listOf(intent))
    // An alarm without days rings at the next such time; one of later can only be one of every week.
    intent.putIntegerArrayListExtra(AlarmClock.EXTRA_DAYS, arrayListOf(date.dayOfWeek.value % 7 + 1)) // as Calendar.SUNDAY is 1
    return PhoneAction(R.string.act_alarm_weekly, listOf(shown, day(date.dayOfWeek)), listOf(intent))
}

private fun timer(n: String, unit: String): PhoneAction? {
    if (!NUMBER.matches(n)) return null
    val seconds = n.toInt() * if (unit == "min") {
        60
    } else if (unit == "sec") {
        1
    } else {
        return null
    }
    if (seconds > LONGEST_TIMER) return null
    val intent = Intent(AlarmClock.ACTION_SET_TIMER)
        .putExtra(AlarmClock.EXTRA_LENGTH, seconds)
        .putExtra(AlarmClock.EXTRA_SKIP_UI, false)
    return PhoneAction(R.string.act_timer, listOf("$n $unit"), listOf(intent))
}

/** A model knows names, and this app no contacts: whom it goes to is chosen in the app that sends it, unless the name is a number. */
private fun message(to: String, body: String): PhoneAction {
    val number = to.takeIf { PHONE_NUMBER.matches(it) }.orEmpty()
    val intent = Intent(Intent.ACTION_SENDTO, Uri.fromParts("smsto", number, null)).putExtra("sms_body", body)
    return PhoneAction(R.string.act_message, listOf(to, body), listOf(intent))
}

private fun music(genre: String, room: String): PhoneAction {
    val intent = Intent(MediaStore.INTENT_ACTION_MEDIA_PLAY_FROM_SEARCH)
        .putExtra(MediaStore.EXTRA_MEDIA_FOCUS, MediaStore.Audio.Genres.ENTRY_CONTENT_TYPE)
        .putExtra(MediaStore.EXTRA_MEDIA_GENRE, genre)
        .putExtra(SearchManager.QUERY, genre)
    return PhoneAction(R.string.act_music, listOf(genre, room), listOf(intent))
}

private fun route(to: String, by: String): PhoneAction? {
    val place = Intent(Intent.ACTION_VIEW, Uri.parse("geo:0,0?q=" + Uri.encode(to)))
    val mode = when (by) {
        "car" -> "d"

        "bike" -> "b"

        "foot" -> "w"

        "bus" -> null

        // navigation has no such mode: the map shows the place
        else -> return null
    }
    val navigation = mode?.let { Intent(Intent.ACTION_VIEW, Uri.parse("google.navigation:q=" + Uri.encode(to) + "&mode=" + it)) }
    return PhoneAction(R.string.act_route, listOf(to, by), listOfNotNull(navigation, place))
}

private fun event(what: String, who: String, dayText: String, timeText: String, now: LocalDateTime): PhoneAction? {
    val at = (date(dayText, now.toLocalDate()) ?: return null).atTime(time(timeText) ?: return null)
    val title = "$what – $who"
    val intent = Intent(Intent.ACTION_INSERT, CalendarContract.Events.CONTENT_URI)
        .putExtra(CalendarContract.Events.TITLE, title)
        .putExtra(CalendarContract.EXTRA_EVENT_BEGIN_TIME, at.atZone(ZoneId.systemDefault()).toInstant().toEpochMilli())
    val shown = DateTimeFormatter.ofLocalizedDateTime(FormatStyle.MEDIUM, FormatStyle.SHORT).format(at)
    return PhoneAction(R.string.act_event, listOf(title, shown), listOf(intent))
}

private fun day(day: DayOfWeek): String = day.getDisplayName(TextStyle.FULL, Locale.getDefault())
